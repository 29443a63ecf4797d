//! What can be wrong with a checkpoint of TensorRT-LLM.
use graphs::DType;

/// `key` is a path in the config.json, `file` a rank's file in the folder.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum RankFault {
    #[error("`{key}` is `{found}`, wanted {wanted}")]
    Key { key: String, found: String, wanted: String },
    #[error("`{key}` is missing")]
    MissingKey { key: String },
    #[error("`mapping.pp_size` is `{found}`, wanted 1: layers divided among ranks are not read")]
    Pipeline { found: usize },
    #[error("`mapping.world_size` is `{found}`, wanted `{wanted}`, tp_size x pp_size")]
    World { found: usize, wanted: usize },
    #[error("the files of {ranks} ranks are wanted, `{file}` is missing")]
    MissingRank { file: String, ranks: usize },
    #[error("the files of {ranks} ranks are wanted, `{file}` is there too")]
    ExtraRank { file: String, ranks: usize },
    #[error("`{file}` has no tensor `{tensor}`, which rank 0 has")]
    MissingTensor { file: String, tensor: String },
    #[error("`{file}` has tensors that no layer of the model has: {}", listed(tensors))]
    Unknown { file: String, tensors: Vec<String> },
    #[error("tensor `{tensor}` in `{file}` has shape {found:?}, wanted {wanted}")]
    Shape { file: String, tensor: String, found: Vec<usize>, wanted: String },
    #[error("tensor `{tensor}` in `{file}` is {found}, wanted {wanted} as in rank 0")]
    Type { file: String, tensor: String, found: DType, wanted: DType },
    #[error("tensor `{tensor}` in `{file}` differs from that of rank 0, where all ranks have the same")]
    Differs { file: String, tensor: String },
    #[error(
        "tensor `{tensor}` in `{file}` belongs to weights in the order of TensorRT-LLM's kernels, which is not read"
    )]
    Kernels { file: String, tensor: String },
    #[error("tensor `{tensor}` is made of `{part}`, whose {found} heads or rows {ranks} ranks do not share alike")]
    Share { tensor: String, part: String, found: usize, ranks: usize },
    #[error("the model is not supported: {reason}")]
    Config { reason: String },
    #[error("`{key}` is `{encoder}` in encoder/config.json and `{decoder}` in decoder/config.json, wanted the same")]
    Sides { key: String, encoder: String, decoder: String },
}

impl RankFault {
    pub(in crate::checkpoint) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Key { .. } | Self::MissingKey { .. } | Self::Config { .. } => {
                "read are LlamaForCausalLM, OPTForCausalLM, and EncoderModel with DecoderModel (t5, mbart)"
            }
            Self::Pipeline { .. } => "convert again with pp_size 1; `build --tp N` divides it among ranks",
            Self::World { .. } | Self::Sides { .. } => "the config.json must be the one that belongs to the rank files",
            Self::MissingRank { .. } | Self::MissingTensor { .. } => "copy the files of all ranks into the folder",
            Self::ExtraRank { .. } => "the folder mixes files of two conversions: convert into an empty one",
            Self::Unknown { .. } => "only what the model needs may be there: parts for other decoders are not read",
            Self::Shape { .. } | Self::Type { .. } | Self::Differs { .. } | Self::Share { .. } => {
                "all rank files and the config.json must come from one conversion"
            }
            Self::Kernels { .. } => {
                "convert without weight-only options and build with --quant, or export with NVIDIA's modelopt"
            }
        };
        Some(hint.to_owned())
    }
}

fn listed(names: &[String]) -> String {
    let shown: Vec<String> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(shown.len()) {
        0 => shown.join(", "),
        rest => format!("{} and {rest} more", shown.join(", ")),
    }
}
