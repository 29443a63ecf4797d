//! Checkpoints of Hugging Face: opened by their headers, tensors read by position when they are needed.
//! Nothing in a checkpoint is run, and nothing outside its folder (or its entry of the hub's cache) is read.
mod archive;
mod bin_fault;
mod cache;
mod containment;
#[cfg(feature = "hub")]
mod download;
mod error;
mod fault;
mod header;
mod hub;
mod json;
mod nearest;
mod parts;
mod pickle;
mod quantized;
mod state_dict;
mod torch_bin;
pub(crate) mod trtllm;
mod weights;

pub use bin_fault::BinFault;
pub use cache::HubSettings;
pub use error::CheckpointError;
pub use fault::HeaderFault;
pub use hub::{Download, HubError};
pub use nearest::nearest;
pub(crate) use parts::PARTS;
pub use quantized::{InputScale, QuantizedFault, QuantizedLinear};
pub use trtllm::RankFault;
pub use weights::{TensorEntry, Weights, open_weights};

use containment::Folder;
use parts::Part;
use quantized::{QuantizationScheme, Quantized};
use serde_json::{Map, Value};
use std::path::Path;
use weights::Watched;

/// More than any tokenizer.json, and little enough to be held in memory.
const MAX_JSON: u64 = 100_000_000;

/// How a checkpoint is found.
#[derive(Default)]
pub struct Options<'a> {
    pub hub: HubSettings,
    /// Called while files are fetched, once for each piece of a file that has arrived.
    pub progress: Option<&'a dyn Fn(Download<'_>)>,
}

/// An open checkpoint: its config, and handles on its weight files.
#[derive(Debug)]
pub struct Checkpoint {
    folder: Folder,
    config: Value,
    config_files: Vec<Watched>,
    parts: Vec<Part>,
    weights: Weights,
    quantized: Option<Quantized>,
    /// Of a checkpoint of TensorRT-LLM.
    ranks: Option<usize>,
}

impl Checkpoint {
    /// Opens a folder, or a model of the hub by its id: `org/name`, `org/name@revision`, `hf://org/name@revision`.
    /// A path that exists wins over an id; a model in the local cache is not looked for on the hub.
    pub fn open(model: &str, options: &Options<'_>) -> Result<Checkpoint, CheckpointError> {
        let id = match model.strip_prefix("hf://") {
            Some(id) => id,
            None if Path::new(model).exists() => return Self::open_folder(Path::new(model)),
            None => model,
        };
        match cache::HubId::parse(id) {
            Some(id) => Self::open_folder(&hub::snapshot(&id, options)?),
            None => Err(CheckpointError::NotFound { model: model.to_owned() }),
        }
    }

    /// Opens a folder with config.json and safetensors or PyTorch files, one whose parts have folders of their own, or a
    /// checkpoint of TensorRT-LLM, which is presented as the one that it was made of; reads headers only.
    pub fn open_folder(path: &Path) -> Result<Checkpoint, CheckpointError> {
        let folder = Folder::open(path)?;
        if let Some(trtllm::Opened { config, config_files, weights, scheme, ranks }) = trtllm::open(&folder)? {
            let schemes: Vec<_> = scheme.map(|scheme| (String::new(), scheme)).into_iter().collect();
            let quantized = Quantized::new(&weights, &schemes).map_err(|error| error.of_folder(folder.path()))?;
            let (config, parts, ranks) = (Value::Object(config), Vec::new(), Some(ranks));
            return Ok(Checkpoint { folder, config, config_files, parts, weights, quantized, ranks });
        }
        let (mut config, config_file) = read_object(&folder, "config.json")?;
        let parts = parts::open(&folder, &mut config)?;
        let schemes = schemes(&folder, &config, &parts);
        // What the config says of a scheme that is not supported tells more than the first tensor of a strange type.
        let (weights, schemes) = match (parts::weights(&folder, &parts), schemes) {
            (Ok(weights), schemes) => (weights, schemes?),
            (Err(_), Err(scheme)) => return Err(scheme),
            (Err(error), Ok(_)) => return Err(error),
        };
        let quantized = Quantized::new(&weights, &schemes).map_err(|error| error.of_folder(folder.path()))?;
        let config_files = vec![config_file];
        Ok(Checkpoint { folder, config: Value::Object(config), config_files, parts, weights, quantized, ranks: None })
    }

    /// How many ranks a checkpoint of TensorRT-LLM is for; `None` of others.
    pub fn ranks(&self) -> Option<usize> {
        self.ranks
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The folder itself, then those of its parts.
    pub fn folders(&self) -> Vec<&Path> {
        self.all_folders().map(Folder::path).collect()
    }

    fn all_folders(&self) -> impl Iterator<Item = &Folder> {
        std::iter::once(&self.folder).chain(self.parts.iter().map(|part| &part.folder))
    }

    /// The contents of config.json, always an object; where it nests the configs of parts, they are the parts' own.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Another JSON file of the folder, such as `generation_config.json`; `None` where there is none.
    pub fn json(&self, file_name: &str) -> Result<Option<Value>, CheckpointError> {
        Ok(read_json(&self.folder, file_name)?.map(|(value, _)| value))
    }

    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// A tensor of [`Self::tensors`], or one that belongs to a quantized layer.
    pub fn tensor(&self, name: &str) -> Option<&TensorEntry> {
        match &self.quantized {
            Some(quantized) => quantized.tensor(name),
            None => self.weights.tensor(name),
        }
    }

    /// All tensors, sorted by name; in a checkpoint of several folders names begin with that of the folder. Each layer that
    /// another tool has quantized has its weight in float32 in the place of what the files hold.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = (&str, &TensorEntry)> {
        let tensors = self.quantized.as_ref().map_or(self.weights.all(), Quantized::presented);
        tensors.iter().map(|(name, entry)| (name.as_str(), entry))
    }

    /// What another tool has made of the layer with this weight.
    pub fn quantized_linear(&self, weight: &str) -> Option<&QuantizedLinear> {
        self.quantized.as_ref()?.linear(weight)
    }

    /// The tensors that such a layer has besides its weight: what replaces `.weight` in its name.
    pub fn quantized_extras(&self, weight: &str) -> Vec<&'static str> {
        self.quantized.as_ref().map(|quantized| quantized.extras(weight)).unwrap_or_default()
    }

    /// The tool that quantized the checkpoint and how many layers it has in which format, in words.
    pub fn quantization(&self) -> Option<String> {
        let quantized = self.quantized.as_ref()?;
        let mut counts = std::collections::BTreeMap::<String, usize>::new();
        for linear in quantized.linears() {
            let inputs = if linear.inputs == InputScale::None { "" } else { ", int8 inputs" };
            *counts.entry(format!("{}{inputs}", linear.format)).or_default() += 1;
        }
        let counts: Vec<String> = counts.iter().map(|(format, count)| format!("{format} x {count}")).collect();
        (!counts.is_empty()).then(|| format!("{} ({})", quantized.tool(), counts.join("; ")))
    }

    /// The tool that quantized layers of the checkpoint.
    pub fn quantized_by(&self) -> Option<&'static str> {
        self.quantized.as_ref().map(Quantized::tool)
    }

    /// Fills `buffer` with the bytes of a tensor from `offset_in_tensor` on. Threads may read at the same time.
    pub fn read_into(&self, name: &str, offset_in_tensor: u64, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        if let Some(quantized) = &self.quantized {
            let made = quantized.read_into(&self.weights, name, offset_in_tensor, buffer);
            if made.map_err(|error| error.of_folder(self.folder.path()))? {
                return Ok(());
            }
        }
        self.weights.read_into(name, offset_in_tensor, buffer)
    }

    /// Checks that config and weights still are the files that were opened; meant for the end of a build.
    pub fn unchanged(&self) -> Result<(), CheckpointError> {
        self.config_files.iter().try_for_each(Watched::unchanged)?;
        self.parts.iter().try_for_each(|part| part.config_file.unchanged())?;
        self.weights.unchanged()
    }

    /// Things worth telling the user, one sentence each: code in the checkpoint, which is never run.
    pub fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        let nested = parts::PARTS.iter().filter_map(|(key, _)| self.config.get(key));
        if std::iter::once(&self.config).chain(nested).any(|config| config.get("auto_map").is_some()) {
            warnings.push("config.json asks for code of its own (`auto_map`), which is never run".to_owned());
        }
        for folder in self.all_folders() {
            if let Ok(scripts) = folder.names(|name| name.ends_with(".py")) {
                warnings.extend(scripts.iter().map(|name| format!("`{name}` is never run")));
            }
        }
        warnings
    }

    /// What is worth knowing and no reason to worry: weights that are there twice.
    pub fn notes(&self) -> Vec<String> {
        let is_bin = |path: &Path| path.extension().is_some_and(|ending| ending == "bin");
        let unread = |folder: &Folder| {
            let mut names = folder.names(weights::is_bin).ok()?.into_iter();
            let name = names.next()?;
            let read = self.weights.files().any(|file| is_bin(file) && file.parent() == Some(folder.path()));
            (!read).then(|| {
                format!("weights are read from safetensors; the PyTorch files beside them, as `{name}`, are not")
            })
        };
        self.all_folders().filter_map(unread).collect()
    }
}

/// How each part of a checkpoint is quantized, by the prefix of its tensors' names.
fn schemes(
    root: &Folder,
    config: &Map<String, Value>,
    parts: &[Part],
) -> Result<Vec<(String, QuantizationScheme)>, CheckpointError> {
    let empty = Map::new();
    let object = |key: &str| config.get(key).and_then(Value::as_object).unwrap_or(&empty);
    let inner = parts.iter().map(|part| (format!("{}.", part.name), &part.folder, object(part.key)));
    let all: Vec<_> = inner.chain([(String::new(), root, config)]).collect();
    let mut found = Vec::new();
    for (prefix, folder, config) in all {
        let mut beside = |name: &str| match read_json(folder, name)? {
            Some((Value::Object(object), _)) => Ok(Some(object)),
            Some((other, _)) => {
                Err(CheckpointError::NotAnObject { path: folder.path().join(name), found: json::kind(&other) })
            }
            None => Ok(None),
        };
        let scheme = quantized::read_scheme(config, &mut beside).map_err(|error| error.of_folder(folder.path()))?;
        found.extend(scheme.map(|scheme| (prefix, scheme)));
    }
    Ok(found)
}

/// A JSON file that must be there and hold an object.
fn read_object(folder: &Folder, name: &str) -> Result<(Map<String, Value>, Watched), CheckpointError> {
    let path = folder.path().join(name);
    match read_json(folder, name)? {
        Some((Value::Object(object), watched)) => Ok((object, watched)),
        Some((other, _)) => Err(CheckpointError::NotAnObject { path, found: json::kind(&other) }),
        None => Err(CheckpointError::MissingFile { path }),
    }
}

fn read_json(folder: &Folder, name: &str) -> Result<Option<(Value, Watched)>, CheckpointError> {
    use std::io::Read;
    let Some(file) = folder.file(name)? else { return Ok(None) };
    let path = folder.path().join(name);
    let watched = Watched::new(path.clone(), &file)?;
    if watched.bytes() > MAX_JSON {
        return Err(CheckpointError::JsonSize { path, found: watched.bytes(), wanted: MAX_JSON });
    }
    let mut bytes = Vec::new();
    if let Err(source) = file.take(MAX_JSON).read_to_end(&mut bytes) {
        return Err(CheckpointError::Io { path, source });
    }
    match json::parse(&bytes) {
        Ok(value) => Ok(Some((value, watched))),
        Err(source) => Err(CheckpointError::Json { path, source }),
    }
}
