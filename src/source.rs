//! A checkpoint that is known to fit its model: canonical names over whatever the files call their tensors.
use crate::checkpoint::{Checkpoint, CheckpointError, QuantizedLinear, TensorEntry, nearest};
use graphs::interpret::Values;
use graphs::{Coverage, DType, Facts, GraphError, Logits, Model, Network, VISION_TOWER, Weight, cover};
use quant::{Entry, Source, SourceError};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Faults listed one by one before the rest is only counted.
const LISTED: usize = 20;

#[derive(Debug, Error)]
pub enum ModelError {
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    Graph(#[from] GraphError),
    #[error("`{language}` is no language part for `{model}`")]
    Language { model: String, language: String, source: Box<GraphError> },
    #[error("the vision tower `{name}`, which config.json names, is not found: looked {}", places(.folders))]
    NoTower { name: String, folders: Vec<PathBuf> },
    #[error("`{given}` is given as vision tower, and the model takes none")]
    TowerNotWanted { given: String },
    #[error("the weights in `{folder}` do not fit config.json:{}", list(.faults))]
    Misfit { folder: String, faults: Vec<Fault> },
}

#[derive(Debug, Error, PartialEq)]
pub enum Fault {
    #[error("tensor `{name}` is missing{}", .nearest.as_ref().map(|near| format!(", there is `{near}`")).unwrap_or_default())]
    Missing { name: String, nearest: Option<String> },
    #[error("tensor `{name}` is used by no layer of the model")]
    Unused { name: String },
    #[error("tensor `{name}`: wanted shape {wanted:?}, found {found:?}")]
    Shape { name: String, wanted: Vec<usize>, found: Vec<usize> },
    #[error("tensor `{name}`: wanted float32, float16 or bfloat16, found {found}")]
    DType { name: String, found: DType },
}

fn list(faults: &[Fault]) -> String {
    let mut text = String::new();
    for fault in faults.iter().take(LISTED) {
        let _ = write!(text, "\n  {fault}");
    }
    if faults.len() > LISTED {
        let _ = write!(text, "\n  and {} more", faults.len() - LISTED);
    }
    text
}

fn places(folders: &[PathBuf]) -> String {
    let folders = folders.iter().map(|folder| format!("at `{}`, ", folder.display()));
    format!("{}in the hub's cache", folders.collect::<String>())
}

impl ModelError {
    pub fn hint(&self) -> Option<String> {
        match self {
            ModelError::Checkpoint(error) => error.hint(),
            ModelError::Graph(error) => error.hint(),
            ModelError::Language { .. } => Some("--language takes the checkpoint that the model was made of".into()),
            ModelError::NoTower { .. } => Some("give its folder or hub id with --vision-tower".into()),
            ModelError::TowerNotWanted { .. } => Some("leave --vision-tower out: the checkpoint has its own".into()),
            ModelError::Misfit { .. } => {
                Some("the config must be the one that belongs to the weights, and every shard must be there".into())
            }
        }
    }
}

/// A checkpoint and the model that it holds.
#[derive(Debug)]
pub struct ModelSource {
    pub checkpoint: Checkpoint,
    pub model: Model,
    coverage: Coverage,
    /// Where the language part's tensors come from, if not from `checkpoint`.
    language: Option<Box<ModelSource>>,
    /// The vision tower's folder, where it has one of its own.
    tower: Option<Checkpoint>,
    /// A folder whose files that are no weights come before all others.
    pub tokenizer: Option<PathBuf>,
}

/// The model of a checkpoint; what its generation config says of the token that a decoder starts with goes before config.json.
fn model(checkpoint: &Checkpoint, config: &Value) -> Result<Model, ModelError> {
    const KEY: &str = "decoder_start_token_id";
    let model = Model::from_config(config)?;
    let generation = checkpoint.json("generation_config.json")?;
    let asked = generation.as_ref().and_then(|file| file.get(KEY)).filter(|value| !value.is_null());
    let fault = |reason| GraphError::Config { key: KEY.into(), reason };
    let model = match asked.map(|value| (value, value.as_u64().and_then(|id| usize::try_from(id).ok()))) {
        None => model,
        Some((_, Some(id))) => model.starting_with(id),
        Some((value, None)) => {
            return Err(fault(format!("found `{value}` in generation_config.json, wanted one id")).into());
        }
    };
    let Facts { vocab, decoder_start_id, .. } = model.facts();
    match decoder_start_id.filter(|&id| id >= vocab) {
        Some(id) => Err(fault(format!("token id `{id}` is outside the vocabulary of `{vocab}`")).into()),
        None => Ok(model),
    }
}

impl ModelSource {
    /// Reads headers only: every tensor that the model needs is there with its shape, and none lies unused.
    ///
    /// # Errors
    /// All faults found, not the first only.
    pub fn new(checkpoint: Checkpoint) -> Result<ModelSource, ModelError> {
        let model = model(&checkpoint, checkpoint.config())?;
        let networks = model.networks(DType::Float32, Logits::Last)?;
        let mut coverage = cover(&model, &networks, checkpoint.tensors().map(|(name, _)| name));
        adopt_biases(&mut coverage, &checkpoint);
        let faults = faults(&networks, &coverage, |name| checkpoint.tensor(coverage.found.get(name)?));
        if !faults.is_empty() {
            return Err(ModelError::Misfit { folder: checkpoint.folder().display().to_string(), faults });
        }
        Ok(ModelSource { checkpoint, model, coverage, language: None, tower: None, tokenizer: None }.with_extras())
    }

    /// The same with the language part of another checkpoint, which is checked by itself and must fit. Tensors of the
    /// language part that lie in `checkpoint` too are ignored.
    ///
    /// # Errors
    /// As [`ModelSource::new`], and two that do not belong together.
    pub fn with_language(checkpoint: Checkpoint, language: Checkpoint) -> Result<ModelSource, ModelError> {
        let other = ModelSource::new(language)?;
        let folder = |checkpoint: &Checkpoint| checkpoint.folder().display().to_string();
        let model = model(&checkpoint, checkpoint.config())?.with_language(other.model.clone()).map_err(|source| {
            let (model, language) = (folder(&checkpoint), folder(&other.checkpoint));
            ModelError::Language { model, language, source: Box::new(source) }
        })?;
        let mut networks = model.networks(DType::Float32, Logits::Last)?;
        networks.retain(|network| network.name == "vision");
        let prefix = model.language_prefix();
        let (theirs, own): (Vec<&str>, Vec<&str>) =
            checkpoint.tensors().map(|(name, _)| name).partition(|name| name.starts_with(prefix));
        let mut coverage = cover(&model, &networks, own.into_iter());
        coverage.ignored.extend(theirs.into_iter().map(str::to_owned));
        let faults = faults(&networks, &coverage, |name| checkpoint.tensor(coverage.found.get(name)?));
        if !faults.is_empty() {
            return Err(ModelError::Misfit { folder: folder(&checkpoint), faults });
        }
        let found = other.coverage.found.iter().map(|(name, stored)| (format!("{prefix}{name}"), stored.clone()));
        coverage.found.extend(found);
        Ok(ModelSource { checkpoint, model, coverage, language: Some(Box::new(other)), tower: None, tokenizer: None }
            .with_extras())
    }

    /// The same with a vision tower from another folder, whose names are taken to follow [`VISION_TOWER`].
    ///
    /// # Errors
    /// As [`ModelSource::new`].
    pub fn with_tower(checkpoint: Checkpoint, tower: Checkpoint) -> Result<ModelSource, ModelError> {
        let mut config = checkpoint.config().clone();
        // CLIP's own config holds that of its text side too.
        config["vision_config"] = tower.config().get("vision_config").unwrap_or(tower.config()).clone();
        let model = model(&checkpoint, &config)?;
        let networks = model.networks(DType::Float32, Logits::Last)?;
        let mut names: Vec<String> = checkpoint.tensors().map(|(name, _)| name.to_owned()).collect();
        // A tower that was trained with the rest lies among it, and then its own folder is out of date.
        if !names.iter().any(|name| name.starts_with("model.vision_tower.")) {
            names.extend(tower.tensors().map(|(name, _)| format!("{VISION_TOWER}{name}")));
        }
        let coverage = cover(&model, &networks, names.iter().map(String::as_str));
        let source = ModelSource { checkpoint, model, coverage, language: None, tower: Some(tower), tokenizer: None };
        let faults = faults(&networks, &source.coverage, |name| source.tensor(name).map(|(_, entry)| entry));
        if !faults.is_empty() {
            return Err(ModelError::Misfit { folder: source.checkpoint.folder().display().to_string(), faults });
        }
        Ok(source.with_extras())
    }

    /// Adds the tensors that layers quantized by other tools have besides their weights.
    fn with_extras(mut self) -> ModelSource {
        let mut extras = Vec::new();
        for (name, stored) in &self.coverage.found {
            let (checkpoint, inner) = self.holder(name, stored);
            if let (Some(name), Some(stored)) = (name.strip_suffix(".weight"), stored.strip_suffix(".weight")) {
                let named = |extra| (format!("{name}{extra}"), format!("{stored}{extra}"));
                extras.extend(checkpoint.quantized_extras(inner).into_iter().map(named));
            }
        }
        self.coverage.found.extend(extras);
        self
    }

    /// What another tool has made of the layer with a weight of this canonical name.
    pub fn quantized_linear(&self, weight: &str) -> Option<&QuantizedLinear> {
        let (checkpoint, inner) = self.holder(weight, self.coverage.found.get(weight)?);
        checkpoint.quantized_linear(inner)
    }

    /// The tool that quantized a layer of this canonical weight.
    pub fn quantized_by(&self, weight: &str) -> Option<&'static str> {
        self.quantized_linear(weight)?;
        self.holder(weight, self.coverage.found.get(weight)?).0.quantized_by()
    }

    /// Every checkpoint that the model is read from; the one that it is named by comes first.
    pub fn checkpoints(&self) -> impl Iterator<Item = &Checkpoint> {
        let others = self.language.iter().map(|other| &other.checkpoint).chain(&self.tower);
        std::iter::once(&self.checkpoint).chain(others)
    }

    /// Where a file of the model that is no weights may lie, in the order in which to look.
    pub fn folders(&self) -> Vec<&Path> {
        let own = self.checkpoints().flat_map(Checkpoint::folders);
        self.tokenizer.as_deref().into_iter().chain(own).collect()
    }

    /// The checkpoint that holds a tensor of a canonical and a stored name, and the name in it.
    fn holder<'s>(&'s self, name: &str, stored: &'s str) -> (&'s Checkpoint, &'s str) {
        match (&self.language, &self.tower, stored.strip_prefix(VISION_TOWER)) {
            (Some(other), ..) if name.starts_with(self.model.language_prefix()) => (&other.checkpoint, stored),
            (_, Some(tower), Some(inner)) => (tower, inner),
            _ => (&self.checkpoint, stored),
        }
    }

    /// The checkpoint that holds the tensor of a canonical name, and the name in it.
    pub(crate) fn stored(&self, name: &str) -> Option<(&Checkpoint, &str)> {
        Some(self.holder(name, self.coverage.found.get(name)?))
    }

    /// # Errors
    /// As [`Model::networks`].
    pub fn networks(&self, dtype: DType, logits: Logits) -> Result<Vec<Network>, ModelError> {
        Ok(self.model.networks(dtype, logits)?)
    }

    pub fn facts(&self) -> Facts {
        self.model.facts()
    }

    /// The type that most of the weights are stored in.
    pub fn dtype(&self) -> DType {
        let bytes_of = |dtype| {
            let tensors = self.checkpoints().flat_map(|checkpoint| checkpoint.weights().tensors());
            let tensors = tensors.filter(|(_, entry)| entry.dtype == dtype);
            tensors.map(|(_, entry)| entry.bytes).sum::<u64>()
        };
        let types = [DType::Float32, DType::Float16, DType::Bfloat16];
        types.into_iter().max_by_key(|&dtype| bytes_of(dtype)).unwrap_or(DType::Float32)
    }

    /// Where a tensor lies, by its canonical name.
    pub fn tensor(&self, name: &str) -> Option<(&str, &TensorEntry)> {
        let stored = self.coverage.found.get(name)?;
        let (checkpoint, inner) = self.holder(name, stored);
        checkpoint.tensor(inner).map(|entry| (stored.as_str(), entry))
    }

    /// The file that a tensor lies in, by its canonical name.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        let (_, entry) = self.tensor(name)?;
        self.holder(name, self.coverage.found.get(name)?).0.weights().path_of(entry)
    }

    pub fn coverage(&self) -> &Coverage {
        &self.coverage
    }
}

/// Biases of quantized layers that the model has none for become part of those layers.
fn adopt_biases(coverage: &mut Coverage, checkpoint: &Checkpoint) {
    let stems: BTreeMap<&str, &str> = coverage
        .found
        .iter()
        .filter(|(_, stored)| checkpoint.quantized_linear(stored).is_some_and(|linear| linear.bias))
        .filter_map(|(name, stored)| Some((stored.strip_suffix(".weight")?, name.strip_suffix(".weight")?)))
        .collect();
    let canonical = |name: &str| stems.get(name.strip_suffix(".bias")?).map(|stem| format!("{stem}.bias"));
    let (adopted, unused): (Vec<_>, Vec<_>) =
        coverage.unused.iter().map(|name| (canonical(name), name.clone())).partition(|(known, _)| known.is_some());
    coverage.unused = unused.into_iter().map(|(_, name)| name).collect();
    coverage.found.extend(adopted.into_iter().filter_map(|(name, stored)| Some((name?, stored))));
}

/// `entry` gives what is stored of a canonical name.
fn faults<'e>(
    networks: &[Network],
    coverage: &Coverage,
    entry: impl Fn(&str) -> Option<&'e TensorEntry>,
) -> Vec<Fault> {
    let unused = || coverage.unused.iter().map(String::as_str);
    let mut faults: Vec<Fault> = coverage
        .missing
        .iter()
        .map(|name| Fault::Missing { name: name.clone(), nearest: nearest(name, unused()).map(str::to_owned) })
        .collect();
    faults.extend(unused().map(|name| Fault::Unused { name: name.to_owned() }));
    let mut wanted: Vec<(&str, &[usize])> =
        networks.iter().flat_map(Network::weights).flat_map(|(_, weight)| weight.tensors()).collect();
    wanted.sort_unstable();
    wanted.dedup();
    for (name, shape) in wanted {
        let Some(entry) = entry(name) else { continue };
        if entry.shape != shape {
            let (wanted, found) = (shape.to_vec(), entry.shape.clone());
            faults.push(Fault::Shape { name: name.into(), wanted, found });
        } else if !entry.dtype.is_float() {
            faults.push(Fault::DType { name: name.into(), found: entry.dtype });
        }
    }
    faults
}

impl Source for ModelSource {
    fn entry(&self, name: &str) -> Option<Entry> {
        self.tensor(name).map(|(_, entry)| Entry { dtype: entry.dtype, shape: entry.shape.clone() })
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let stored = self.coverage.found.get(name).map_or(name, String::as_str);
        let (checkpoint, inner) = self.holder(name, stored);
        checkpoint.read_into(inner, offset, buffer).map_err(SourceError::new)
    }
}

/// Weights of a checkpoint as the interpreter wants them: what an engine of `compute` type would hold, in f32.
pub struct CheckpointValues<'s> {
    pub source: &'s dyn Source,
    pub compute: DType,
}

impl Values for CheckpointValues<'_> {
    fn values(&self, weight: &Weight) -> Result<Vec<f32>, Box<dyn std::error::Error + Send + Sync>> {
        Ok(quant::materialize_f32(weight, self.source, self.compute)?)
    }
}
