//! Where the files of a hub id are: in the local cache, or, when they are not and the user is online, fetched into it.
use super::Options;
use super::cache::HubId;
#[cfg(feature = "hub")]
use super::download::fetch;
use std::path::{Path, PathBuf};

/// How far the download of one file is, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Download<'a> {
    pub file: &'a str,
    pub done: u64,
    pub total: u64,
}

/// Why a model of the hub is not at hand.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    #[error("offline mode is on (HF_HUB_OFFLINE) and `{id}` is not in the cache: looked in `{}`", folder.display())]
    Offline { id: String, folder: PathBuf },
    #[error("this build cannot download, and `{id}` is not in the cache: looked in `{}`", folder.display())]
    NoDownloads { id: String, folder: PathBuf },
    #[error("no folder is known for the cache of the hub")]
    NoCache,
    #[error("`{endpoint}` does not show `{id}` without the right token (401)")]
    Unauthorized { endpoint: String, id: String },
    #[error("`{endpoint}` refuses `{id}` to this account (403)")]
    Forbidden { endpoint: String, id: String },
    #[error("`{endpoint}` has no `{id}` (404)")]
    Absent { endpoint: String, id: String },
    #[error("`{endpoint}` asks to wait before fetching `{id}` (429)")]
    Busy { endpoint: String, id: String },
    #[error("`{endpoint}` answers {status} when asked for `{id}`")]
    Status { endpoint: String, id: String, status: u16 },
    #[error("cannot fetch `{id}` from `{endpoint}`: {cause}")]
    Failed { endpoint: String, id: String, cause: String },
}

impl HubError {
    /// What the user can do about it, where that is clear.
    pub fn hint(&self) -> Option<String> {
        let hint = match self {
            HubError::Offline { .. } => "unset HF_HUB_OFFLINE to download it, or give a folder",
            HubError::NoDownloads { .. } => "fetch it with `hf download`, or build with the feature `hub`",
            HubError::NoCache => "set HF_HOME",
            HubError::Unauthorized { .. } => {
                "check the spelling; if the model is private or gated, set HF_TOKEN to a token that may read it"
            }
            HubError::Forbidden { endpoint, id } => {
                let page = id.split('@').next().unwrap_or(id);
                return Some(format!("accept the terms on `{endpoint}/{page}` with the account of HF_TOKEN"));
            }
            HubError::Absent { .. } => "check the spelling and the revision",
            HubError::Busy { .. } => "try again later, or set HF_TOKEN: signed-in users wait less",
            HubError::Status { .. } => "try again later",
            HubError::Failed { .. } => {
                "check the network and HF_ENDPOINT, or fetch the model elsewhere and give its folder"
            }
        };
        Some(hint.to_owned())
    }
}

/// The folder with the files of `id`. What the cache has is taken as it is; the hub is asked only for what it lacks.
pub(crate) fn snapshot(id: &HubId, options: &Options<'_>) -> Result<PathBuf, HubError> {
    let cache = options.hub.cache.as_deref().ok_or(HubError::NoCache)?;
    let cached = id.snapshot(cache);
    match cached {
        Some(snapshot) if options.hub.offline || is_complete(&snapshot) => Ok(snapshot),
        _ if options.hub.offline => Err(HubError::Offline { id: id.to_string(), folder: cache.join(id.folder_name()) }),
        _ => fetch(id, cache, options),
    }
}

/// Whether the weights are there, in any layout. Weights are fetched last, so the rest is then there too.
fn is_complete(snapshot: &Path) -> bool {
    has_weights(snapshot) || super::parts::PARTS.iter().all(|(_, part)| has_weights(&snapshot.join(part)))
}

fn has_weights(snapshot: &Path) -> bool {
    if ["model.safetensors", "pytorch_model.bin"].iter().any(|name| snapshot.join(name).exists()) {
        return snapshot.join("config.json").exists();
    }
    let read = |kind: &str| std::fs::read(snapshot.join(format!("{kind}.index.json")));
    match read("model.safetensors").or_else(|_| read("pytorch_model.bin")).map(|bytes| super::json::parse(&bytes)) {
        Ok(Ok(index)) => {
            let shards =
                index.get("weight_map").and_then(|map| map.as_object()).into_iter().flat_map(|map| map.values());
            shards.filter_map(|shard| shard.as_str()).all(|shard| snapshot.join(shard).exists())
        }
        Ok(Err(_)) => true, // Opening says what is wrong with it.
        Err(_) => false,
    }
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &HubId, cache: &Path, _: &Options<'_>) -> Result<PathBuf, HubError> {
    Err(HubError::NoDownloads { id: id.to_string(), folder: cache.join(id.folder_name()) })
}
