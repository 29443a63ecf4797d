//! What can be wrong with a checkpoint that another tool has quantized.
use graphs::DType;

/// Sizes and places count from 0; `key` is a path in the file that describes the quantization.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum QuantizedFault {
    #[error("`{key}` is `{found}`, wanted {wanted}")]
    Setting { key: String, found: String, wanted: &'static str },
    #[error("`{key}` asks for a quantized key/value cache (`{found}`), which is not supported")]
    KeyValueCache { key: String, found: String },
    #[error("tensor `{missing}` is missing, which `{present}` needs")]
    Missing { missing: String, present: String },
    #[error("tensor `{tensor}` is {found}{shape:?}, wanted {wanted}")]
    Tensor { tensor: String, found: DType, shape: Vec<usize>, wanted: String },
    #[error("tensor `{tensor}` has groups of {found} inputs, the config says {wanted}")]
    Group { tensor: String, found: usize, wanted: usize },
    #[error("tensor `{tensor}` has {bits} bits and groups of {group} inputs, wanted one scale per output for 8 bits")]
    Int8Groups { tensor: String, bits: usize, group: usize },
    #[error("tensor `{tensor}` is quantized in {found} bits, which no part of the config describes")]
    Undescribed { tensor: String, found: usize },
    #[error("tensor `{tensor}`: the config describes {found} ways to treat inputs of layers as this one, wanted one")]
    Ambiguous { tensor: String, found: usize },
    #[error(
        "tensor `{tensor}` puts input {input} into group {found}, wanted {wanted}: groups must be consecutive inputs"
    )]
    Order { tensor: String, input: usize, found: i32, wanted: usize },
    #[error("tensor `{tensor}` holds the zero point `{found}` at group {group} of output {output}, wanted {wanted}")]
    Zero { tensor: String, output: usize, group: usize, found: i32, wanted: String },
    #[error(
        "tensor `{tensor}` holds the scale `{found}` at group {group} of output {output}, wanted a positive number"
    )]
    Scale { tensor: String, output: usize, group: usize, found: f32 },
    #[error("tensor `{tensor}` holds {found:?}, wanted {wanted:?} as `{packed}` has it")]
    WrongSizes { tensor: String, packed: String, found: Vec<i64>, wanted: Vec<usize> },
}

impl QuantizedFault {
    pub(in crate::checkpoint) fn hint(&self) -> Option<String> {
        let hint = match self {
            Self::Setting { .. } => {
                "read are AutoAWQ (gemm), GPTQ, compressed-tensors (int) and NVIDIA's unified W4A16_AWQ and W8A8_SQ"
            }
            Self::KeyValueCache { .. } => "export the checkpoint without a quantized key/value cache",
            Self::Missing { .. } | Self::Tensor { .. } | Self::WrongSizes { .. } => {
                "the checkpoint is incomplete or damaged: fetch it again"
            }
            Self::Order { .. } => "quantize with `desc_act` false, or with static groups",
            Self::Zero { .. } => "tools disagree about what this means: quantize again, symmetric or as `gptq_v2`",
            Self::Int8Groups { .. } => "quantize to 8 bits with `group_size` -1 (strategy `channel`)",
            Self::Scale { .. } => "the checkpoint is damaged: fetch it again, or quantize again",
            Self::Group { .. } | Self::Undescribed { .. } | Self::Ambiguous { .. } => {
                "the config must be the one that belongs to the weights"
            }
        };
        Some(hint.to_owned())
    }
}
