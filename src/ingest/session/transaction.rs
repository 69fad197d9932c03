//! `MULTI` to `EXEC`: what is queued, and that it is gathered as one group.

use std::ops::Range;

use super::super::connection::CLIENT_BYTES_MAX;
use super::super::core::Core;
use super::group::What;
use super::{Next, ReplyMode, Session};
use crate::wire::command::{Command, Spec};
use crate::wire::decode::{Args, FRAME_BYTES_MAX};
use crate::wire::encode::{self, Out};

/// Commands between `MULTI` and `EXEC`.
#[derive(Default)]
pub(super) struct Transaction {
    bytes: Vec<u8>,
    commands: Vec<(&'static Spec, Vec<Range<usize>>)>,
    pub(super) refused: bool,
}

impl Session {
    /// What a transaction that is being queued holds, in bytes.
    pub fn queued_bytes(&self) -> usize {
        self.transaction
            .as_ref()
            .map_or(0, |transaction| transaction.bytes.len())
    }

    pub(super) fn queue(&mut self, core: &Core, spec: &'static Spec, args: Args<'_>) {
        let Some(transaction) = &mut self.transaction else {
            return;
        };
        let bytes: usize = args.from(0).map(<[u8]>::len).sum();
        if !queueable(spec.command) {
            return self.refuse(core, "ERR Command not allowed inside a transaction");
        }
        if core.client_bytes.get() > CLIENT_BYTES_MAX {
            let text = format!("OOM all clients together hold {CLIENT_BYTES_MAX} bytes");
            return self.refuse(core, &text);
        }
        if transaction.bytes.len() + bytes > FRAME_BYTES_MAX {
            let text = format!("ERR the transaction is larger than {FRAME_BYTES_MAX} bytes");
            return self.refuse(core, &text);
        }
        let ranges = args
            .from(0)
            .map(|arg| {
                let start = transaction.bytes.len();
                transaction.bytes.extend_from_slice(arg);
                start..transaction.bytes.len()
            })
            .collect();
        transaction.commands.push((spec, ranges));
        self.direct(core, |_, raw| {
            encode::simple(raw, "QUEUED");
            None
        });
    }

    pub(super) fn exec(&mut self, core: &Core, out: &mut Out) -> Option<Next> {
        let refusal = match &self.transaction {
            None => Some("ERR EXEC without MULTI"),
            Some(transaction) if transaction.refused => {
                Some("EXECABORT Transaction discarded because of previous errors.")
            }
            Some(_) => None,
        };
        let transaction = self.transaction.take();
        if let Some(text) = refusal {
            self.refuse(core, text);
            return None;
        }
        let Transaction {
            bytes, commands, ..
        } = transaction.unwrap_or_default();
        self.push_piece(What::Array(commands.len()));
        let reply = self.reply;
        for (spec, ranges) in &commands {
            self.gather(core, spec, Args::new(&bytes, ranges), ranges);
            self.reply = reply;
        }
        if reply == ReplyMode::SkipNext {
            self.reply = ReplyMode::On;
        }
        core.stats.commands_total.add(1);
        (self.finish_group(core, &bytes, out) == Next::Cold).then_some(Next::Cold)
    }
}

fn queueable(command: Command) -> bool {
    !matches!(
        command,
        Command::Subscribe
            | Command::Unsubscribe
            | Command::Psubscribe
            | Command::Punsubscribe
            | Command::TallyFlush
            | Command::Hello
            | Command::Auth
    )
}
