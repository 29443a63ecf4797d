//! Checkpoints of TensorRT-LLM: config.json and a file for each rank, or two folders of these for an encoder and a decoder.
//! They are read as the Hugging Face checkpoint that they were made of, whatever the number of ranks.
mod decoders;
mod encoders;
mod fault;
mod join;
mod layout;
mod made;
mod settings;

pub use fault::RankFault;
pub(crate) use join::Joined;
pub(crate) use layout::{ACTIVATION, DECODER, ENCODER, Family, Field, Form, Group, SCALE, Split, extras};
pub(crate) use made::{Made, MadeTensors, turned};
pub(crate) use settings::{GATED_MLP, LAYER_NORM, MLP, NORM_FIRST, RMS_NORM};

use super::containment::Folder;
use super::quantized::{QuantizationScheme, rank_scheme};
use super::weights::{Watched, Weights};
use super::{CheckpointError, read_json, read_object};
use graphs::Model;
use join::{JoinError, Joiner, RankFile};
use serde_json::{Map, Value};
use settings::Settings;
use std::path::PathBuf;

/// A checkpoint as its Hugging Face equivalent.
pub(super) struct Opened {
    pub(super) config: Map<String, Value>,
    pub(super) config_files: Vec<Watched>,
    pub(super) weights: Weights,
    pub(super) scheme: Option<QuantizationScheme>,
    pub(super) ranks: usize,
}

/// One folder with its config.json.
struct Side<'f> {
    name: &'static str,
    folder: &'f Folder,
    settings: Settings,
    watched: Watched,
}

impl Side<'_> {
    fn fault(&self, fault: RankFault) -> CheckpointError {
        CheckpointError::Ranks { path: self.folder.path().join("config.json"), fault: Box::new(fault) }
    }
}

/// Opens a folder that is such a checkpoint, headers only; `None` where it is something else.
pub(super) fn open(root: &Folder) -> Result<Option<Opened>, CheckpointError> {
    match read_json(root, "config.json")? {
        Some((Value::Object(object), watched)) if is_ranks(&object) => {
            let side = Side { name: "", folder: root, settings: Settings { object }, watched };
            return read(root, vec![side]).map(Some);
        }
        Some(_) => return Ok(None),
        None => (),
    }
    let Some(decoder) = root.part(DECODER)? else { return Ok(None) };
    let side = |name, folder| -> Result<Side<'_>, CheckpointError> {
        let (object, watched) = read_object(folder, "config.json")?;
        Ok(Side { name, folder, settings: Settings { object }, watched })
    };
    let found = side(DECODER, &decoder)?;
    if !is_ranks(&found.settings.object) {
        return Ok(None);
    }
    let missing = || CheckpointError::MissingFile { path: root.path().join(ENCODER).join("config.json") };
    let encoder = root.part(ENCODER)?.ok_or_else(missing)?;
    read(root, vec![side(ENCODER, &encoder)?, found]).map(Some)
}

fn is_ranks(config: &Map<String, Value>) -> bool {
    let has = |key: &str| config.get(key).is_some_and(Value::is_object);
    config.get("architecture").is_some_and(Value::is_string)
        && (has("mapping") || has("quantization"))
        && !config.contains_key("architectures")
}

/// The last side is the decoder's.
fn read(root: &Folder, sides: Vec<Side<'_>>) -> Result<Opened, CheckpointError> {
    let mut weights = Weights::empty(root);
    let mut files = Vec::new();
    let mut count = 1;
    for side in &sides {
        count = side.settings.ranks().map_err(|fault| side.fault(fault))?;
        files.push(rank_files(side, count, &mut weights)?);
    }
    let [.., last] = &sides[..] else { return Err(CheckpointError::NoWeights { folder: root.path().to_owned() }) };
    let quantization = last.folder.path();
    let scheme = rank_scheme(&last.settings.object).map_err(|error| error.of_folder(quantization))?;
    let has =
        |name: &str| files.last().and_then(|files| files.first()).is_some_and(|file| file.tensors.contains_key(name));
    let config = match &sides[..] {
        [encoder, decoder] => settings::encoder_decoder(&encoder.settings, &decoder.settings),
        _ => last.settings.decoder_only(&has),
    };
    let config = config.map_err(|fault| last.fault(fault))?;
    let unknown = |error: graphs::GraphError| last.fault(RankFault::Config { reason: error.to_string() });
    let model = Model::from_config(&Value::Object(config.clone())).map_err(unknown)?;
    let embedding = last.settings.embedding().map_err(|fault| last.fault(fault))?;
    let groups = Family::of(&model).map(|family| family.groups(embedding)).unwrap_or_default();
    let mut joiner = Joiner::new(&weights, last.settings.is_int4());
    for (side, files) in sides.iter().zip(&files) {
        let fields = groups.iter().find(|group| group.folder == side.name).map(|group| &group.fields[..]);
        joiner.folder(files, fields.unwrap_or_default()).map_err(|error| match error {
            JoinError::Fault(fault) => CheckpointError::Ranks { path: root.path().to_owned(), fault: Box::new(fault) },
            JoinError::Read(error) => error,
        })?;
    }
    if let Model::Mbart(mbart) = &model
        && !joiner.presented.contains_key("final_logits_bias")
        && let Some(head) = joiner.presented.get("lm_head.weight").cloned()
    {
        joiner.zeros("final_logits_bias", head.dtype, &[1, mbart.vocab]);
    }
    let (joined, presented) = (joiner.joined, joiner.presented);
    weights.present(presented, joined);
    let config_files = sides.into_iter().map(|side| side.watched).collect();
    Ok(Opened { config, config_files, weights, scheme, ranks: count })
}

/// Opens the files of all ranks in one folder, and finds those that are too many.
fn rank_files(side: &Side<'_>, ranks: usize, weights: &mut Weights) -> Result<Vec<RankFile>, CheckpointError> {
    let path = |name: &str| -> PathBuf { side.folder.path().join(name) };
    let file_name = |rank: usize| format!("rank{rank}.safetensors");
    let fault = |fault| CheckpointError::Ranks { path: side.folder.path().to_owned(), fault: Box::new(fault) };
    let is_rank = |name: &str| {
        let number = name.strip_prefix("rank").and_then(|rest| rest.strip_suffix(".safetensors"));
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    let mut files = Vec::new();
    for rank in 0..ranks {
        let name = file_name(rank);
        let Some(file) = side.folder.file(&name)? else {
            return Err(fault(RankFault::MissingRank { file: name, ranks }));
        };
        let tensors = weights.add(path(&name), file)?;
        // An older converter of OPT has a scope more.
        let known = |name: String| match name.strip_prefix("transformer.embedding.") {
            Some(rest) => format!("transformer.{rest}"),
            None => name,
        };
        let tensors = tensors.map(|(name, entry)| (known(name), entry)).collect();
        let name = if side.name.is_empty() { name } else { format!("{}/{name}", side.name) };
        files.push(RankFile { name, tensors });
    }
    let wanted: Vec<String> = (0..ranks).map(file_name).collect();
    match side.folder.names(is_rank)?.into_iter().find(|name| !wanted.contains(name)) {
        Some(file) => Err(fault(RankFault::ExtraRank { file, ranks })),
        None => Ok(files),
    }
}
