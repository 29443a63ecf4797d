//! What a command says when it cannot do what it was asked: one message, its causes, a hint, an exit code.
use crate::report::Printer;
use serde_json::{Value, json};
use std::error::Error;

/// Exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The input is refused: a checkpoint, a recipe, a combination.
    Refused = 1,
    /// The command line is wrong (clap's own code).
    Usage = 2,
    /// Something is missing here: a library, a GPU, disk space.
    Environment = 3,
    /// A check that was asked for did not hold.
    Gate = 4,
    /// TensorRT died or refused.
    Builder = 5,
    /// A fault of trtvlm.
    Internal = 70,
    Interrupted = 130,
}

#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    pub message: String,
    pub causes: Vec<String>,
    pub hint: Option<String>,
    /// The command has written its JSON already, the failure told in it.
    pub told: bool,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        Failure { exit, message: message.into(), causes: Vec::new(), hint: None, told: false }
    }

    /// The error's own text, then those of its sources as causes, each said once.
    pub fn of(exit: Exit, error: &dyn Error) -> Failure {
        let mut failure = Failure::new(exit, error.to_string());
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            let said = failure.message.contains(&text) || failure.causes.iter().any(|cause| cause.contains(&text));
            if !said {
                failure.causes.push(text);
            }
            source = cause.source();
        }
        failure
    }

    #[must_use]
    pub fn hint(mut self, hint: Option<String>) -> Failure {
        self.hint = hint;
        self
    }

    #[must_use]
    pub fn told(mut self) -> Failure {
        self.told = true;
        self
    }

    /// The `error` object of a command's JSON.
    pub fn to_json(&self) -> Value {
        json!({ "message": self.message, "causes": self.causes, "hint": self.hint, "exit": self.exit as u8 })
    }

    /// Writes the failure where the user looks for it.
    pub fn report(&self, printer: &Printer) {
        if printer.is_json() && !self.told {
            printer.json(&json!({ "schema": 1, "error": self.to_json() }));
        }
        printer.failure(self);
    }
}

/// Errors of this crate know their own hint; the exit code is the command's.
macro_rules! failure_from {
    ($($error:ty => $exit:expr),* $(,)?) => {
        $(impl From<$error> for Failure {
            fn from(error: $error) -> Failure {
                Failure::of($exit, &error).hint(error.hint())
            }
        })*
    };
}

failure_from! {
    crate::calibration::GatherError => Exit::Refused,
    crate::calibration::GpuError => Exit::Environment,
    crate::calibration::SearchError => Exit::Refused,
    crate::calibration::StatisticsError => Exit::Refused,
    crate::compile::CompileError => Exit::Refused,
    crate::launch::LaunchError => Exit::Refused,
    crate::mixed::MixedError => Exit::Refused,
    crate::samples::SampleError => Exit::Refused,
    crate::runtime::RuntimeError => Exit::Refused,
    crate::engine_dir::DirectoryError => Exit::Refused,
    crate::processor::ProcessorError => Exit::Refused,
    crate::score::ScoreError => Exit::Refused,
    crate::source::ModelError => Exit::Refused,
    crate::checkpoint::CheckpointError => Exit::Refused,
    quant::QuantError => Exit::Refused,
}

impl From<crate::assemble::AssembleError> for Failure {
    fn from(error: crate::assemble::AssembleError) -> Failure {
        use crate::assemble::AssembleError;
        use crate::builder::BuildFailure;
        use crate::engine_dir::DirectoryError;
        let exit = match &error {
            AssembleError::Build(BuildFailure::Interrupted) => Exit::Interrupted,
            AssembleError::Build(_) => Exit::Builder,
            AssembleError::Directory(DirectoryError::Io { .. }) => Exit::Environment,
            _ => Exit::Refused,
        };
        let mut failure = Failure::of(exit, &error).hint(error.hint());
        if let AssembleError::Build(BuildFailure::Refused { causes, .. }) = error {
            failure.causes = causes;
        }
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_the_sources() {
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read `x`")]
        struct Outer(#[source] std::io::Error);
        let error = Outer(std::io::Error::other("disk on fire"));
        let failure = Failure::of(Exit::Environment, &error).hint(Some("use water".into()));
        assert_eq!((failure.message.as_str(), &failure.causes[..]), ("cannot read `x`", &["disk on fire".into()][..]));
    }

    #[test]
    fn a_cause_that_the_message_quotes_is_not_said_again() {
        #[derive(Debug, thiserror::Error)]
        #[error("no shard: disk on fire")]
        struct Outer(#[source] Middle);
        #[derive(Debug, thiserror::Error)]
        #[error("cannot read `x`")]
        struct Middle(#[source] std::io::Error);
        let failure = Failure::of(Exit::Refused, &Outer(Middle(std::io::Error::other("disk on fire"))));
        assert_eq!(failure.causes, ["cannot read `x`"]);
    }
}
