//! What one client sends, to its answers: no panic, no endless burst, bounded memory.
#![no_main]

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use tallyd::counters::{Table, TableLimits};
use tallyd::ingest::core::{Core, Parts};
use tallyd::ingest::session::{Next, Session};
use tallyd::ingest::{Access, IngestConfig};
use tallyd::journal::Directory;
use tempfile::TempDir;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, mpsc};

/// More than any answer of a burst may take.
const OUT_BYTES_MAX: usize = 32 << 20;
const MIB: usize = 1 << 20;

struct House {
    runtime: Runtime,
    core: Rc<Core>,
    _dir: TempDir,
}

fn house() -> House {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let (_, _, writer) = Directory::open(dir.path(), 1000, 64 * MIB).expect("a new journal");
    let (wanted, _) = mpsc::channel(1);
    let (flush, _) = mpsc::channel(1);
    let core = Core::new(Parts {
        config: IngestConfig {
            key_bytes_max: 1024,
            epoch_keys_max: 1_000_000,
            load: true,
            load_timeout: Duration::ZERO,
            unloaded_is_error: true,
            view_age_max: Duration::from_secs(60),
            sync_always: false,
            connections_max: 10,
            connections_wanted: 10,
            client_bytes_max: 64 * MIB,
            transaction_bytes_max: 4 * MIB,
            channel: "tallyd:deltas".to_owned(),
        },
        access: Access::find(&[], &[], &[]).expect("everything"),
        table: Table::new(TableLimits {
            bytes_max: MIB,
            pending_keys_max: 0,
        }),
        writer,
        stats: Arc::default(),
        wanted,
        heard: Arc::default(),
        flush,
        seal_wanted: Arc::new(Notify::new()),
        hot: Arc::default(),
    });
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    House {
        runtime: runtime.enable_io().build().expect("a runtime"),
        core,
        _dir: dir,
    }
}

thread_local! {
    static HOUSE: House = house();
}

fuzz_target!(|input: &[u8]| {
    HOUSE.with(|House { runtime, core, .. }| {
        let _guard = runtime.enter();
        let (stream, _other) = UnixStream::pair().expect("two sockets");
        let (_read, write) = stream.into_split();
        let client = core.clients.add(&Rc::new(write), &core.accounts);
        let id = client.id;
        let mut session = Session::new(client);
        let mut out = Vec::new();
        let mut at = 0;
        // Each burst does something: a command has a byte, and what is cold is asked for once.
        for _ in 0..2 * input.len() + 2 {
            let before = out.len();
            let (done, next) = session.burst(core, &input[at..], &mut out);
            at += done;
            assert!(out.len() - before < OUT_BYTES_MAX);
            assert!(session.command_bytes() < 64 * MIB);
            match next {
                Next::Close | Next::Read => break,
                Next::Cold => session.finish_cold(core, &mut out),
                Next::Large => runtime.block_on(session.run_large(core, &mut out)),
                Next::More | Next::List | Next::Flush(_) => {}
            }
            out.clear();
        }
        core.clients.remove(id);
        core.hub.borrow_mut().remove(id);
        core.loads.leave(id);
        drop(session);
        assert_eq!(core.accounts.held(), 0, "all is given back");
    });
});
