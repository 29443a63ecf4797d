use std::path::PathBuf;
use thiserror::Error;

/// What TensorRT or its loading refuses.
#[derive(Debug, Error)]
pub enum Error {
    #[error("cannot load `{path}`")]
    Load { path: PathBuf, source: libloading::Error },
    #[error("`{path}` is no TensorRT library: it has no `{symbol}`")]
    Symbol { path: PathBuf, symbol: &'static str },
    #[error(
        "`{path}` is {found}; this version drives TensorRT-RTX 1.5 to 1.x and TensorRT 10.6 to 10.x (but 10.8) and 11"
    )]
    Version { path: PathBuf, found: String },
    #[error(
        "the table of `{class}` has {found} entries, {wanted} were expected: the library does not match its version"
    )]
    Table { class: &'static str, wanted: usize, found: usize },
    #[error("TensorRT needs a CUDA driver to build, and libcuda.so.1 cannot be used here")]
    NoDriver,
    #[error("`{method}` is not in this TensorRT")]
    Absent { method: &'static str },
    #[error("layer `{layer}`: {reason}")]
    Argument { layer: String, reason: String },
    /// `messages` are TensorRT's own, first the one that tells the cause.
    #[error("{}", .messages.first().map_or("TensorRT gave no reason", String::as_str))]
    Refused { messages: Vec<String> },
    #[error("cancelled")]
    Cancelled,
    #[error("cannot write the engine")]
    Write(#[source] std::io::Error),
    #[error("cannot map `{path}`")]
    Map { path: PathBuf, source: std::io::Error },
    #[error("cannot read the memory map of this process")]
    Maps(#[source] std::io::Error),
}

impl Error {
    pub(crate) fn argument(layer: &str, reason: impl Into<String>) -> Error {
        Error::Argument { layer: layer.into(), reason: reason.into() }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Error::NoDriver => Some("use TensorRT-RTX, which builds without a GPU, or run where a GPU is".into()),
            Error::Load { .. } | Error::Symbol { .. } | Error::Version { .. } | Error::Table { .. } => {
                Some("`trtvlm backend list` shows the libraries found; `trtvlm backend install rtx` gets one".into())
            }
            _ => None,
        }
    }
}

pub type Result<T> = std::result::Result<T, Error>;
