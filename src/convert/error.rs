use crate::checkpoint::CheckpointError;
use crate::engine_dir::DirectoryError;
use quant::QuantError;
use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("TensorRT-LLM's format has no place for `{model_type}`")]
    Family { model_type: &'static str },
    #[error("embeddings of {embedding} features in a model of {hidden} have no place in TensorRT-LLM's format")]
    Narrow { embedding: usize, hidden: usize },
    #[error("--tp 0: there is at least one rank")]
    NoRanks,
    #[error("--tp {ranks}: `{tensor}`: {reason}")]
    Share { tensor: String, ranks: usize, reason: String, possible: Vec<usize> },
    #[error("layers quantized by `{tool}` have another layout than TensorRT-LLM's")]
    Tool { tool: &'static str },
    #[error("`{tensor}` is quantized in another way than `{other}`, TensorRT-LLM's format says one for all layers")]
    Mixed { tensor: String, other: String },
    #[error("`{tensor}` and `{other}` differ, and TensorRT-LLM's format has one for both")]
    Differ { tensor: String, other: String },
    #[error("`{path}` exists and is not empty")]
    Exists { path: PathBuf },
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    #[error("cannot write `{file}`")]
    Weights { file: PathBuf, source: QuantError },
    #[error("tensor `{tensor}` cannot be read")]
    Read { tensor: String, source: quant::SourceError },
    #[error("cannot write config.json")]
    Config(#[from] serde_json::Error),
}

impl ConvertError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Family { .. } => {
                "it has places for LLaMA, OPT, T5 and mBART with their encoders, and for them as the \
                language part of LLaVA, VILA and BLIP-2"
                    .into()
            }
            Self::Narrow { .. } => "build the checkpoint itself".into(),
            Self::NoRanks => "--tp 1 writes one file with the whole".into(),
            Self::Share { possible, .. } => {
                format!("--tp may be {}", possible.iter().map(usize::to_string).collect::<Vec<_>>().join(", "))
            }
            Self::Tool { .. } | Self::Mixed { .. } | Self::Differ { .. } => {
                "build the checkpoint itself, which keeps its numbers, or convert the one that is not quantized".into()
            }
            Self::Exists { .. } => "choose another folder with -o, or remove this one".into(),
            Self::Checkpoint(error) => return error.hint(),
            Self::Directory(error) => return error.hint(),
            Self::Weights { source, .. } => return source.hint(),
            Self::Read { .. } | Self::Config(_) => return None,
        })
    }
}
