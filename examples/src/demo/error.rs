use std::io;
use std::path::PathBuf;

/// Why the demo could not be carried to a verdict.
#[derive(Debug, thiserror::Error)]
pub(super) enum DemoError {
    /// No KVM here.
    #[error(
        "cannot use /dev/kvm ({0}). This demo runs a real virtual machine; `cargo demo -- --machine model` runs the same story without KVM."
    )]
    NoKvm(io::Error),
    /// Something that the host must have.
    #[error("{0}")]
    Host(String),
    /// The report cannot be written.
    #[error("cannot write {path}: {source}")]
    Report {
        /// The file.
        path: PathBuf,
        /// The answer.
        source: io::Error,
    },
    /// The pair did not do what was expected.
    #[error("{source}\n(logs and state of both sides are kept in {kept})")]
    Pair {
        /// What happened.
        source: tests::real::Error,
        /// Directory with the logs.
        kept: String,
    },
    /// The pair could not be set up.
    #[error(transparent)]
    Setup(#[from] tests::real::Error),
}

impl DemoError {
    /// See [`super::main`].
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::NoKvm(_) => 10,
            Self::Host(_)
            | Self::Setup(tests::real::Error::MissingTool { .. } | tests::real::Error::NoNamespaces { .. }) => 69,
            Self::Report { .. } | Self::Pair { .. } | Self::Setup(_) => 1,
        }
    }
}
