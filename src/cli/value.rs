//! What values flags take, and how they are read.
use clap::ValueEnum;
use graphs::DType;

/// How the table of words is divided among the ranks of tensor parallelism.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EmbeddingSharding {
    /// By words
    Vocab,
    /// Not at all
    None,
}

impl EmbeddingSharding {
    pub fn name(self) -> &'static str {
        match self {
            EmbeddingSharding::Vocab => "vocab",
            EmbeddingSharding::None => "none",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A GPU where there is one
    Auto,
    Cpu,
    Cuda,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Target {
    /// Interpreted on the CPU
    Reference,
    /// TensorRT-RTX engines, built without a GPU
    Rtx,
    /// TensorRT 10 engines, built and run on the GPU at hand
    Tensorrt,
}

impl Target {
    /// Its name in a manifest.
    pub fn name(self) -> &'static str {
        match self {
            Target::Reference => "reference",
            Target::Rtx => "rtx",
            Target::Tensorrt => "tensorrt",
        }
    }
}

/// A type, or none for the checkpoint's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DTypeChoice(pub Option<DType>);

pub(super) fn dtype(text: &str) -> Result<DTypeChoice, String> {
    match float(text) {
        Ok(dtype) => Ok(DTypeChoice(Some(dtype))),
        Err(_) if text == "auto" => Ok(DTypeChoice(None)),
        Err(_) => Err("wanted auto, float16, bfloat16 or float32".into()),
    }
}

pub(super) fn float(text: &str) -> Result<DType, String> {
    let known = DType::parse(text).filter(|dtype| dtype.is_float() && dtype.name() == text);
    known.ok_or_else(|| "wanted float16, bfloat16 or float32".into())
}

/// Compute capabilities that TensorRT-RTX builds for.
pub const GPUS: [u32; 6] = [75, 80, 86, 89, 120, 121];

pub(super) fn gpu(text: &str) -> Result<u32, String> {
    let number = text.strip_prefix("sm").and_then(|number| number.parse().ok());
    number.filter(|number| GPUS.contains(number)).ok_or_else(|| {
        let names: Vec<String> = GPUS.iter().map(|gpu| format!("sm{gpu}")).collect();
        format!("wanted one of {}", names.join(", "))
    })
}

pub(super) fn jobs(text: &str) -> Result<usize, String> {
    let number = text.parse().ok().filter(|number| (1..=1024).contains(number));
    number.ok_or_else(|| "wanted a number from 1 to 1024".into())
}

pub(super) fn bound(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|bound: &f64| bound.is_finite() && *bound >= 0.0);
    number.ok_or_else(|| "wanted a number from 0 on".into())
}
