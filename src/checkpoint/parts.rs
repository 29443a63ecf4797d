//! Checkpoints of several folders (VILA 1.5), known by the root's config: each part has a config and weights of its own.
use super::containment::Folder;
use super::weights::{Watched, Weights};
use super::{CheckpointError, read_object};
use serde_json::{Map, Value};

/// Keys of the root's config, and the folder that each is about.
pub(crate) const PARTS: [(&str, &str); 3] =
    [("llm_cfg", "llm"), ("vision_tower_cfg", "vision_tower"), ("mm_projector_cfg", "mm_projector")];

/// One folder of a checkpoint.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) name: &'static str,
    /// Where the root's config holds the part's own.
    pub(super) key: &'static str,
    pub(super) folder: Folder,
    pub(super) config_file: Watched,
}

/// The parts that the root's config has keys for. Each part's own config.json takes the place of what the root says about
/// it, which may be out of date or only a path on its author's machine.
pub(super) fn open(root: &Folder, config: &mut Map<String, Value>) -> Result<Vec<Part>, CheckpointError> {
    let mut parts = Vec::new();
    for (key, name) in PARTS {
        let Some(value) = config.get_mut(key).filter(|value| !value.is_null()) else { continue };
        let missing = || CheckpointError::MissingPart { folder: root.path().join(name), key };
        let folder = root.part(name)?.ok_or_else(missing)?;
        let (own, config_file) = read_object(&folder, "config.json")?;
        *value = Value::Object(own);
        parts.push(Part { name, key, folder, config_file });
    }
    Ok(parts)
}

/// The weights of all parts; a tensor's name begins with its part's.
pub(super) fn weights(root: &Folder, parts: &[Part]) -> Result<Weights, CheckpointError> {
    if parts.is_empty() {
        return Weights::open(root);
    }
    let mut weights = Weights::empty(root);
    for Part { name, folder, .. } in parts {
        weights.join(name, Weights::open(folder)?);
    }
    Ok(weights)
}
