//! The vision tower of a checkpoint that comes without one: which folder holds it.
use crate::checkpoint::{Checkpoint, CheckpointError, HubSettings, Options};
use crate::source::ModelError;
use graphs::Model;
use std::path::{Path, PathBuf};

/// Opens the tower that is given, or else the one that config.json names: a folder of that name in the checkpoint's or
/// beside it, or a model of the hub, which is fetched only where the checkpoint came from there too (`from_hub`).
///
/// # Errors
/// A tower that is not found or cannot be opened, and one that is given to a model with its own.
pub fn open(
    checkpoint: &Checkpoint,
    given: Option<&str>,
    from_hub: bool,
    options: &Options<'_>,
) -> Result<Option<Checkpoint>, ModelError> {
    match (Model::vision_tower(checkpoint.config()), given) {
        (None, None) => Ok(None),
        (None, Some(given)) => Err(ModelError::TowerNotWanted { given: given.to_owned() }),
        (Some(_), Some(given)) => Ok(Some(Checkpoint::open(given, options)?)),
        (Some(name), None) => named(checkpoint.folder(), name, from_hub, options).map(Some),
    }
}

fn named(folder: &Path, name: &str, from_hub: bool, options: &Options<'_>) -> Result<Checkpoint, ModelError> {
    // The last part alone: a checkpoint must not lead to places of its own choice.
    let last = Path::new(name).file_name();
    let folders: Vec<PathBuf> = match (last, folder.canonicalize()) {
        (Some(last), Ok(folder)) => std::iter::successors(Some(folder.as_path()), |folder| folder.parent())
            .take(2)
            .map(|folder| folder.join(last))
            .collect(),
        _ => Vec::new(),
    };
    if let Some(found) = folders.iter().find(|folder| folder.join("config.json").is_file()) {
        return Ok(Checkpoint::open_folder(found)?);
    }
    let mut hub: HubSettings = options.hub.clone();
    hub.offline |= !from_hub;
    match Checkpoint::open(&format!("hf://{name}"), &Options { hub, progress: options.progress }) {
        Err(CheckpointError::Hub(_) | CheckpointError::NotFound { .. }) if !from_hub => {
            Err(ModelError::NoTower { name: name.chars().take(200).collect(), folders })
        }
        other => Ok(other?),
    }
}
