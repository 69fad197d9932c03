//! Exit codes: a contract with service managers and scripts (`sysexits.h`).

/// How the program ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitCode {
    /// All is well.
    Success,
    /// The command line makes no sense.
    Usage,
    /// A fault of the program.
    Internal,
    /// A file, a socket or the disk failed.
    Io,
    /// The configuration is wrong.
    Configuration,
}

impl ExitCode {
    /// The number.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Usage => 64,
            Self::Internal => 70,
            Self::Io => 74,
            Self::Configuration => 78,
        }
    }
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(exit: ExitCode) -> Self {
        Self::from(exit.code())
    }
}
