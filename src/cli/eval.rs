//! How `eval` is asked.
use super::value::{DTypeChoice, dtype};
use crate::compile::KvCache;
use clap::{Args, Subcommand};
use std::path::PathBuf;

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Perplexity of a text under each scheme, and how far its next tokens are from the unquantized model's
    Text(EvalTextArgs),
    /// Exact match, character error rate and likelihood of answers about pictures under each scheme
    Pictures(EvalPicturesArgs),
}

#[derive(Debug, Args)]
pub struct EvalTextArgs {
    pub model: String,
    #[arg(long, value_name = "FILE")]
    pub text: PathBuf,
    /// Tokens from the start of the text
    #[arg(long, default_value_t = 4096)]
    pub tokens: usize,
    /// Tokens that see each other
    #[arg(long, default_value_t = 512)]
    pub window: usize,
    #[arg(long, value_delimiter = ',', default_value = "none")]
    pub quant: Vec<String>,
    /// Statistics that `calibrate` wrote
    #[arg(long, value_name = "STATS")]
    pub calibration: Option<PathBuf>,
    /// As `build` takes it, for every scheme; compared with a cache of the networks' own type
    #[arg(long, value_enum, default_value = "auto")]
    pub kv_cache: KvCache,
    /// Write a page with what each scheme does to each layer, and the figures of the whole model
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: DTypeChoice,
}

#[derive(Debug, Args)]
pub struct EvalPicturesArgs {
    pub model: String,
    /// Tensor `pictures`, uint8 [count, height, width, channels]
    #[arg(long, value_name = "FILE")]
    pub pictures: PathBuf,
    /// JSON list of the expected answers
    #[arg(long, value_name = "FILE")]
    pub references: PathBuf,
    /// JSON object with `prompt` (null for a model that reads pages) and `maxtok`
    #[arg(long, value_name = "FILE")]
    pub task: PathBuf,
    #[arg(long, value_delimiter = ',', default_value = "none")]
    pub quant: Vec<String>,
    /// Statistics that `calibrate` wrote
    #[arg(long, value_name = "STATS")]
    pub calibration: Option<PathBuf>,
    #[arg(long, default_value = "none")]
    pub vision_quant: String,
    /// As `build` takes it, for every scheme; compared with a cache of the networks' own type
    #[arg(long, value_enum, default_value = "auto")]
    pub kv_cache: KvCache,
    /// Only the first pictures
    #[arg(long)]
    pub limit: Option<usize>,
    /// Write a page with what each scheme does to each layer, and the figures of the whole model
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    #[arg(long, default_value = "auto", value_parser = dtype)]
    pub dtype: DTypeChoice,
}
