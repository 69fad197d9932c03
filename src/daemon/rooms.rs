//! What each room is told of the configuration.

use std::sync::{Arc, OnceLock};

use tokio_util::sync::CancellationToken;

use super::Shared;
use super::descriptors::Connections;
use crate::admin::feed::Feed;
use crate::admin::{self, AdminError};
use crate::config::{AdminListen, Cold, Config, Delivery, OnTimeout, StoreUrl, SyncPolicy};
use crate::flush::stage::Durable;
use crate::flush::{FileWork, FlushConfig};
use crate::ingest::{Access, IngestConfig};
use crate::socket::ListenError;
use crate::store::redis::{self, Place, RedisConfig, SentinelConfig};

/// The admin server, started, where one is asked for.
///
/// # Errors
/// See [`AdminError`].
pub(super) fn admin(
    config: &Config,
    shared: &Shared,
    connections: Connections,
) -> Result<Option<admin::Server>, AdminError> {
    let address = match config.admin.listen.clone() {
        None => return Ok(None),
        Some(AdminListen::Tcp(address)) => admin::Address::Tcp(address),
        Some(AdminListen::Unix(path)) => admin::Address::Unix {
            path,
            mode: config.listen.mode,
            group: config.listen.group.clone(),
        },
    };
    let context = admin::Context {
        stats: Arc::clone(&shared.stats),
        health: Arc::clone(&shared.health),
        name: config.node.name.clone(),
        node: OnceLock::new(),
        store: config.store.url.to_string(),
        record_bytes_max: crate::journal::format::record_bytes(config.limits.max_key_bytes) as u64,
        hot: Arc::clone(&shared.hot),
        feed: Feed::default(),
        stop: CancellationToken::new(),
    };
    admin::Bound::bind(&address)?
        .start(Arc::new(context), connections.admin)
        .map(Some)
}

/// For the Redis store; `None` where the store is the embedded one.
pub(super) fn redis(config: &Config) -> Option<RedisConfig> {
    let place = match &config.store.url {
        StoreUrl::Embedded => return None,
        StoreUrl::Redis(info) => Place::Server(info.addr().clone()),
        StoreUrl::Sentinel(url) => {
            let password = config.store.sentinel_password.as_ref();
            Place::Sentinels(SentinelConfig {
                sentinels: url.sentinels.clone(),
                master: url.master.clone(),
                is_tls: url.is_tls,
                password: password.map(|secret| secret.expose().to_owned()),
            })
        }
    };
    Some(RedisConfig {
        place,
        login: config.store.url.login()?.clone(),
        delivery: match config.flush.delivery {
            Delivery::ExactlyOnce => redis::Delivery::ExactlyOnce,
            Delivery::AtLeastOnce => redis::Delivery::AtLeastOnce,
        },
        channel: config.publish.channel.clone(),
        timeouts: redis::Timeouts::default(),
    })
}

/// Who may connect, and which keys they may use.
///
/// # Errors
/// A name that the system does not know.
pub(super) fn access(config: &Config) -> Result<Access, ListenError> {
    Access::find(
        &config.listen.allow_uids,
        &config.listen.allow_gids,
        &config.limits.allow_keys,
    )
}

/// For the ingest thread.
pub(super) fn ingest(config: &Config, connections: Connections) -> IngestConfig {
    IngestConfig {
        key_bytes_max: config.limits.max_key_bytes,
        epoch_keys_max: config.flush.max_keys,
        load: config.reply.cold == Cold::Load,
        load_timeout: config.reply.load_timeout,
        unloaded_is_error: config.reply.on_timeout == OnTimeout::Error,
        view_age_max: config.view.max_age,
        sync_always: config.journal.sync == SyncPolicy::Always,
        connections_max: connections.clients,
        connections_wanted: config.listen.max_connections,
        client_bytes_max: config.limits.max_client_bytes as usize,
        transaction_bytes_max: config.limits.max_transaction_bytes as usize,
        channel: config.publish.channel.clone(),
    }
}

/// For the flush stage.
pub(super) fn flush(config: &Config) -> FlushConfig {
    FlushConfig {
        interval: config.flush.interval,
        store_url: config.store.url.to_string(),
        exactly_once: config.flush.delivery == Delivery::ExactlyOnce
            || config.store.url == StoreUrl::Embedded,
        retain: config.flush.retain,
        retained_bytes_max: config.flush.max_retained_bytes as usize,
        replicas: config.flush.replicas as u32,
        replicas_timeout: config.flush.replicas_timeout,
        durable: match config.journal.sync {
            SyncPolicy::Never => Durable::Nothing,
            SyncPolicy::Interval => Durable::Sealed,
            SyncPolicy::Always => Durable::Records,
        },
        file_work: FileWork::Apart,
        pending_bytes_max: config.limits.max_pending_bytes as usize,
    }
}
