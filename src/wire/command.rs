//! The commands served: their names and how many arguments they take.

/// A command, by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)] // each is the command of its name
pub enum Command {
    Incr,
    Decr,
    IncrBy,
    DecrBy,
    Get,
    Mget,
    Exists,
    Multi,
    Exec,
    Discard,
    Subscribe,
    Unsubscribe,
    Psubscribe,
    Punsubscribe,
    Pubsub,
    Ping,
    Echo,
    Hello,
    Auth,
    Select,
    Reset,
    Quit,
    CommandInfo,
    Info,
    Time,
    Client,
    Config,
    TallyFlush,
    TallyHot,
    TallyPending,
    TallyStats,
}

/// A command's entry in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Spec {
    /// Which one.
    pub command: Command,
    /// Its name in lower case, as errors print it.
    pub name: &'static str,
    /// As `COMMAND` tells it: so many arguments with the name, or at least `-arity`.
    pub arity: i32,
    /// First and last key, and the step between keys; zeros for none.
    pub keys: (i8, i8, i8),
    /// Whether it changes a counter.
    pub write: bool,
}

const fn spec(command: Command, name: &'static str, arity: i32) -> Spec {
    Spec {
        command,
        name,
        arity,
        keys: (0, 0, 0),
        write: false,
    }
}

const fn one_key(command: Command, name: &'static str, arity: i32, write: bool) -> Spec {
    Spec {
        command,
        name,
        arity,
        keys: (1, 1, 1),
        write,
    }
}

const fn all_keys(command: Command, name: &'static str, arity: i32) -> Spec {
    Spec {
        command,
        name,
        arity,
        keys: (1, -1, 1),
        write: false,
    }
}

/// Every command, the most frequent first.
pub const COMMANDS: &[Spec] = &[
    one_key(Command::Incr, "incr", 2, true),
    one_key(Command::IncrBy, "incrby", 3, true),
    one_key(Command::Get, "get", 2, false),
    one_key(Command::Decr, "decr", 2, true),
    one_key(Command::DecrBy, "decrby", 3, true),
    all_keys(Command::Mget, "mget", -2),
    all_keys(Command::Exists, "exists", -2),
    spec(Command::Multi, "multi", 1),
    spec(Command::Exec, "exec", 1),
    spec(Command::Discard, "discard", 1),
    spec(Command::Ping, "ping", -1),
    spec(Command::Echo, "echo", 2),
    spec(Command::Hello, "hello", -1),
    spec(Command::Auth, "auth", -2),
    spec(Command::Select, "select", 2),
    spec(Command::Reset, "reset", 1),
    spec(Command::Quit, "quit", -1),
    spec(Command::CommandInfo, "command", -1),
    spec(Command::Info, "info", -1),
    spec(Command::Time, "time", 1),
    spec(Command::Client, "client", -2),
    spec(Command::Config, "config", -2),
    spec(Command::Subscribe, "subscribe", -2),
    spec(Command::Unsubscribe, "unsubscribe", -1),
    spec(Command::Psubscribe, "psubscribe", -2),
    spec(Command::Punsubscribe, "punsubscribe", -1),
    spec(Command::Pubsub, "pubsub", -2),
    spec(Command::TallyFlush, "tally.flush", -1),
    spec(Command::TallyHot, "tally.hot", -1),
    one_key(Command::TallyPending, "tally.pending", 2, false),
    spec(Command::TallyStats, "tally.stats", 1),
];

impl Spec {
    /// Whether so many arguments, the name included, are right.
    #[inline]
    pub fn takes(&self, args: usize) -> bool {
        if self.arity >= 0 {
            args == self.arity as usize
        } else {
            args >= self.arity.unsigned_abs() as usize
        }
    }
}

/// Finds a command by its name in any case.
#[inline]
pub fn lookup(name: &[u8]) -> Option<&'static Spec> {
    COMMANDS
        .iter()
        .find(|spec| spec.name.as_bytes().eq_ignore_ascii_case(name))
}
