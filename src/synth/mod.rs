//! Checkpoints of real shapes with random weights: real sizes can be built and timed where weights cannot be had.
//! The same shape, type and seed give the same bytes on every machine.
mod companions;
mod draw;
mod shapes;
mod weights;

pub use shapes::find;
pub use weights::Summary;

use crate::checkpoint::PARTS;
use graphs::{DType, GraphError, Logits, Model};
use serde_json::{Value, json};
use std::io;
use std::path::{Path, PathBuf};
use thiserror::Error;

#[derive(Debug, Error)]
pub enum SynthError {
    #[error("`{name}` is neither a known shape nor a config.json or its folder")]
    Unknown { name: String, known: Vec<&'static str> },
    #[error("cannot read `{}`", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("`{}` is not valid JSON", path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("cannot write `{}`", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("`{}` exists and is not an empty folder", path.display())]
    Occupied { path: PathBuf },
    #[error("weights cannot be drawn as {0}, wanted float16, bfloat16 or float32")]
    DType(DType),
    #[error("the config has no `num_hidden_layers` or `decoder_layers` of its language part that could be set to {0}")]
    Layers(usize),
    #[error("a vocabulary of {found} is too small for a tokenizer of bytes, which takes {wanted}")]
    Vocabulary { found: usize, wanted: usize },
    #[error(transparent)]
    Graph(#[from] GraphError),
}

impl SynthError {
    pub fn hint(&self) -> Option<String> {
        match self {
            SynthError::Unknown { known, .. } => Some(format!("known shapes are {}", known.join(", "))),
            SynthError::Occupied { .. } => Some("name a folder that does not exist yet, or remove this one".into()),
            SynthError::Write { .. } => Some("what was written so far is removed; is there room on the disk?".into()),
            SynthError::Graph(error) => error.hint(),
            _ => None,
        }
    }

    fn writing(path: &Path) -> impl Fn(io::Error) -> SynthError {
        move |source| SynthError::Write { path: path.to_owned(), source }
    }
}

/// What is to be written.
#[derive(Clone, Debug)]
pub struct Order {
    /// As [`find`] gives it.
    pub config: Value,
    pub dtype: DType,
    pub seed: u64,
    /// Layers of the language part, where not the config's.
    pub layers: Option<usize>,
}

/// Writes a checkpoint into `folder`, which is made. `progress` is told the bytes of weights done and of all, by any
/// thread.
///
/// # Errors
/// A config that is no model's, a folder that holds something, a failing write: nothing written is left then.
pub fn write(order: &Order, folder: &Path, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Summary, SynthError> {
    if !order.dtype.is_float() {
        return Err(SynthError::DType(order.dtype));
    }
    let (config, model) = resolve(order)?;
    let networks = model.networks(order.dtype, Logits::Last)?;
    let parts: Vec<(&str, &str)> = PARTS.into_iter().filter(|(key, _)| config.get(key).is_some()).collect();
    let companions = companions::files(&config, &model.facts(), &parts)?;
    let groups = weights::groups(weights::tensors(&networks), &parts);
    let made = claim(folder)?;
    let written = draw(&groups, order, folder, progress).and_then(|summary| {
        // The config comes last: a folder without it is no checkpoint, should this one be cut off.
        for (name, content) in companions {
            let path = folder.join(name);
            std::fs::write(&path, format!("{content:#}\n")).map_err(SynthError::writing(&path))?;
        }
        Ok(summary)
    });
    if written.is_err() {
        empty(folder, made);
    }
    written
}

/// Writes each group of tensors into its folder.
fn draw(
    groups: &[(&str, Vec<weights::Tensor>)],
    order: &Order,
    folder: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Summary, SynthError> {
    let total = groups.iter().map(|(_, tensors)| weights::bytes(tensors, order.dtype)).sum();
    let mut summary = Summary::default();
    for (part, tensors) in groups {
        let place = if part.is_empty() { folder.to_owned() } else { folder.join(part) };
        std::fs::create_dir_all(&place).map_err(SynthError::writing(&place))?;
        let before = summary.bytes;
        let progress = |done, _| progress(before + done, total);
        let written = weights::write(tensors, order.dtype, order.seed, &place, &progress)?;
        let name = |name: String| if part.is_empty() { name } else { format!("{part}/{name}") };
        summary.files.extend(written.files.into_iter().map(name));
        summary.tensors += written.tensors;
        summary.values += written.values;
        summary.bytes += written.bytes;
    }
    Ok(summary)
}

/// The config as it is written, and its model.
fn resolve(order: &Order) -> Result<(Value, Model), SynthError> {
    let mut config = order.config.clone();
    set_dtype(&mut config, order.dtype);
    if let Some(layers) = order.layers {
        let nested =
            ["text_config", "llm_cfg", "decoder"].into_iter().find(|key| config.get(key).is_some_and(Value::is_object));
        let language = match nested {
            Some(key) => config.get_mut(key),
            None => Some(&mut config),
        };
        if let Some(keys) = language.and_then(Value::as_object_mut) {
            let key = if keys.contains_key("decoder_layers") { "decoder_layers" } else { "num_hidden_layers" };
            keys.insert(key.into(), json!(layers));
        }
    }
    let model = Model::from_config(&config)?;
    match order.layers {
        Some(layers) if layers != model.facts().layers => Err(SynthError::Layers(layers)),
        _ => Ok((config, model)),
    }
}

/// `torch_dtype` always, `dtype` (transformers 5) and those of the parts where they are there.
fn set_dtype(config: &mut Value, dtype: DType) {
    let Some(keys) = config.as_object_mut() else { return };
    for (key, value) in keys.iter_mut() {
        match key.as_str() {
            "torch_dtype" | "dtype" => *value = json!(dtype),
            _ if value.get("torch_dtype").or(value.get("dtype")).is_some() => set_dtype(value, dtype),
            _ => {}
        }
    }
    keys.insert("torch_dtype".into(), json!(dtype));
}

/// Makes the folder; says whether it was not there.
fn claim(folder: &Path) -> Result<bool, SynthError> {
    let occupied = || SynthError::Occupied { path: folder.to_owned() };
    match std::fs::read_dir(folder).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(false),
        Ok(false) => Err(occupied()),
        Err(error) => match error.kind() {
            io::ErrorKind::NotFound => {
                std::fs::create_dir_all(folder).map(|()| true).map_err(SynthError::writing(folder))
            }
            io::ErrorKind::NotADirectory => Err(occupied()),
            _ => Err(SynthError::writing(folder)(error)),
        },
    }
}

/// Takes back what a failed run wrote; the folder was empty before, so all in it is ours.
fn empty(folder: &Path, made: bool) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        // The failure that is reported matters more than one met while cleaning up after it.
        let path = entry.path();
        let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    }
    if made {
        let _ = std::fs::remove_dir(folder);
    }
}
