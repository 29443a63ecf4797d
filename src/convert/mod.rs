//! From a checkpoint to TensorRT-LLM's format: config.json and one file of tensors for each rank, written tensor by tensor.
mod config;
mod divide;
mod error;
mod raw;

pub use error::ConvertError;

use crate::checkpoint::trtllm::{Family, Split};
use crate::engine_dir::{DirectoryError, Staging};
use crate::processor;
use crate::source::ModelSource;
use divide::Divider;
use graphs::DType;
use raw::RawSource;
use std::path::Path;

/// What is to be written where.
pub struct Order<'o> {
    pub source: &'o ModelSource,
    /// Ranks of tensor parallelism.
    pub ranks: usize,
    /// Of the weights; the checkpoint's own where nothing is asked for.
    pub dtype: Option<DType>,
    /// New, or empty.
    pub output: &'o Path,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Summary {
    /// Of weights, in the folder.
    pub files: Vec<String>,
    /// In all of them.
    pub tensors: usize,
    /// Of the files.
    pub bytes: u64,
}

/// Largest number of ranks that an error suggests.
const LARGEST: usize = 64;

/// Writes the folder and moves it to its place when all of it is there. Tokenizer and picture settings of the model are put
/// beside, so that what was converted can be built by itself. `progress` is told the file, its bytes done and all of its bytes.
///
/// # Errors
/// A model that the format has no place for, ranks that do not divide it (both before anything is read), a folder that holds
/// something, and whatever fails on the way; the output is then as it was before.
pub fn convert(order: &Order<'_>, progress: &mut dyn FnMut(&str, u64, u64)) -> Result<Summary, ConvertError> {
    let Order { source, ranks, dtype, output } = *order;
    let model_type = source.facts().model_type;
    let family = Family::of(&source.model).ok_or(ConvertError::Family { model_type })?;
    if let Family::Opt(opt) = family
        && opt.embedding != opt.hidden
    {
        return Err(ConvertError::Narrow { embedding: opt.embedding, hidden: opt.hidden });
    }
    if ranks == 0 {
        return Err(ConvertError::NoRanks);
    }
    let dtype = dtype.unwrap_or_else(|| source.dtype());
    let embedding = match family {
        Family::Llama(_) | Family::Opt(_) => Split::Words,
        Family::T5(_) | Family::Mbart(_) => Split::Whole,
    };
    let raw = RawSource { source };
    let prefix = source.model.language_prefix();
    let mut groups = family.groups(embedding);
    let parts = groups.iter_mut().flat_map(|group| &mut group.fields).flat_map(|field| &mut field.parts);
    parts.for_each(|part| part.name = format!("{prefix}{}", part.name));
    let quantization = raw.quantization(&groups)?;
    let divider = |ranks| Divider { source: &raw, ranks, dtype };
    let check = |ranks| groups.iter().flat_map(|group| &group.fields).try_for_each(|field| divider(ranks).check(field));
    if let Err(fault) = check(ranks) {
        let possible = (1..=LARGEST).filter(|ranks| check(*ranks).is_ok()).collect();
        return Err(fault.of(ranks, possible));
    }
    if output.exists() && output.read_dir().map_err(DirectoryError::io("list", output))?.next().is_some() {
        return Err(ConvertError::Exists { path: output.to_owned() });
    }
    let staging = Staging::start(output, |_| ())?;
    let mut summary = Summary::default();
    for group in &groups {
        let place = |name: &str| match group.folder {
            "" => name.to_owned(),
            folder => format!("{folder}/{name}"),
        };
        let has = |name: &str| group.fields.iter().any(|field| field.name == name && divider(ranks).has(field));
        let settings = config::Settings { family, folder: group.folder, ranks, dtype, quantization: &quantization };
        let own = source.checkpoints().last().map(crate::checkpoint::Checkpoint::config);
        let text = serde_json::to_string_pretty(&settings.config(&has, own))?;
        staging.write(&place("config.json"), format!("{text}\n").as_bytes())?;
        for rank in 0..ranks {
            let name = place(&format!("rank{rank}.safetensors"));
            let path = staging.place(&name)?;
            let mut progress = |done, total| progress(&name, done, total);
            let stored = divider(ranks).store(rank, &group.fields, &path, &mut progress)?;
            summary.tensors += stored.tensors;
            summary.bytes += stored.bytes;
            summary.files.push(name);
        }
    }
    for name in processor::FILES {
        let mut files = source.folders().into_iter().map(|folder| folder.join(name));
        if let Some(from) = files.find(|file| file.is_file()) {
            std::fs::copy(&from, staging.place(name)?).map_err(DirectoryError::io("copy", &from))?;
        }
    }
    source.checkpoints().try_for_each(crate::checkpoint::Checkpoint::unchanged)?;
    staging.publish_files()?;
    Ok(summary)
}
