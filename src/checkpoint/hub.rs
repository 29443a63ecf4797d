//! Where the files of a hub id are: in the local cache, or, when they are not and the user is online, fetched into it.
use super::Options;
use super::cache::HubId;
use std::path::{Path, PathBuf};

pub(crate) const PUBLIC_HUB: &str = "https://huggingface.co";

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

    /// From what the hub answered (`None`: it did not) and what the client says about it.
    #[cfg_attr(not(feature = "hub"), allow(dead_code))]
    fn from_answer(endpoint: &str, id: &HubId, status: Option<u16>, cause: String) -> HubError {
        let (endpoint, id) = (endpoint.to_owned(), id.to_string());
        match status {
            Some(401) => HubError::Unauthorized { endpoint, id },
            Some(403) => HubError::Forbidden { endpoint, id },
            Some(404) => HubError::Absent { endpoint, id },
            Some(429) => HubError::Busy { endpoint, id },
            Some(status) => HubError::Status { endpoint, id, status },
            None => HubError::Failed { endpoint, id, cause },
        }
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
    if snapshot.join("model.safetensors").exists() {
        return snapshot.join("config.json").exists();
    }
    match std::fs::read(snapshot.join("model.safetensors.index.json")).map(|bytes| super::json::parse(&bytes)) {
        Ok(Ok(index)) => {
            let shards =
                index.get("weight_map").and_then(|map| map.as_object()).into_iter().flat_map(|map| map.values());
            shards.filter_map(|shard| shard.as_str()).all(|shard| snapshot.join(shard).exists())
        }
        Ok(Err(_)) => true, // Opening says what is wrong with it.
        Err(_) => snapshot.join("llm").is_dir(),
    }
}

#[cfg(not(feature = "hub"))]
fn fetch(id: &HubId, cache: &Path, _: &Options<'_>) -> Result<PathBuf, HubError> {
    Err(HubError::NoDownloads { id: id.to_string(), folder: cache.join(id.folder_name()) })
}

#[cfg(feature = "hub")]
fn fetch(id: &HubId, cache: &Path, options: &Options<'_>) -> Result<PathBuf, HubError> {
    use hf_hub::api::sync::{ApiBuilder, ApiError};
    use hf_hub::{Cache, Repo, RepoType};

    let endpoint = options.hub.endpoint.as_deref().unwrap_or(PUBLIC_HUB);
    let failed = |error: ApiError| {
        let cause = error.to_string();
        let status = match error {
            ApiError::RequestError(error) => error.into_response().map(|response| response.status()),
            _ => None,
        };
        HubError::from_answer(endpoint, id, status, cause)
    };
    let repository = |revision: &str| Repo::with_revision(id.repository.clone(), RepoType::Model, revision.to_owned());
    let cache = Cache::new(cache.to_owned());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(endpoint.to_owned())
        .with_token(options.hub.token())
        .with_retries(3)
        .with_progress(false)
        .with_user_agent("trtvlm", env!("CARGO_PKG_VERSION"))
        .build()
        .map_err(failed)?;
    let info = api.repo(repository(&id.revision)).info().map_err(failed)?;
    let odd = |cause: String| HubError::from_answer(endpoint, id, None, cause);
    if super::containment::not_plain(&info.sha).is_some() {
        return Err(odd("the hub names no commit".to_owned()));
    }
    // All files of one commit, whatever happens on the hub meanwhile.
    let fixed = api.repo(repository(&info.sha));
    let local = cache.repo(repository(&info.sha));
    let names: Vec<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
    for name in wanted(&names) {
        if local.get(name).is_none() {
            let report = Report { file: name.to_owned(), done: 0, total: 0, callback: options.progress };
            fixed.download_with_progress(name, report).map_err(failed)?;
        }
    }
    cache.repo(repository(&id.revision)).create_ref(&info.sha).map_err(|error| odd(error.to_string()))?;
    id.snapshot(cache.path()).ok_or_else(|| odd("the hub lists no files that are read".to_owned()))
}

/// Passes the client's progress on.
#[cfg(feature = "hub")]
struct Report<'a> {
    file: String,
    done: u64,
    total: u64,
    callback: Option<&'a dyn Fn(Download<'_>)>,
}

#[cfg(feature = "hub")]
impl hf_hub::api::Progress for Report<'_> {
    fn init(&mut self, size: usize, _: &str) {
        (self.done, self.total) = (0, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.done += size as u64;
        if let Some(callback) = self.callback {
            callback(Download { file: &self.file, done: self.done, total: self.total });
        }
    }

    fn finish(&mut self) {}
}

/// The files worth fetching, weights last: texts of the top folder and of the folders below it, and the safetensors of one layout.
#[cfg_attr(not(feature = "hub"), allow(dead_code))]
fn wanted<'n>(files: &[&'n str]) -> Vec<&'n str> {
    let plain = |name: &str| name.split('/').all(|part| super::containment::not_plain(part).is_none());
    let is_weights = |name: &str| name.ends_with(".safetensors");
    let is_usual = |name: &str| name == "model.safetensors" || name.starts_with("model-");
    let top_has_weights = files.iter().any(|name| is_weights(name) && !name.contains('/'));
    let kept = |path: &str| {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        // Folders below the top hold other formats of the same weights, unless the top has none (VILA).
        if folder.contains('/') || !plain(path) || (top_has_weights && !folder.is_empty()) {
            return false;
        }
        if is_weights(name) {
            let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
            let beside = |name: &str| {
                let rest = name.strip_prefix(&prefix)?;
                (!rest.contains('/') && is_weights(rest)).then(|| is_usual(rest))
            };
            return is_usual(name) || !files.iter().any(|name| beside(name) == Some(true));
        }
        name == "tokenizer.model" || [".json", ".jinja", ".txt"].iter().any(|ending| name.ends_with(ending))
    };
    let mut names: Vec<&str> = files.iter().copied().filter(|name| kept(name)).collect();
    names.sort_by_key(|name| (is_weights(name), *name));
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_become_errors_with_hints() {
        let id = HubId::parse("a/b").unwrap();
        let error = |status| HubError::from_answer("https://hub", &id, status, "no route to host".into());
        let text = |status| format!("{}; {}", error(status), error(status).hint().unwrap());
        assert!(
            text(Some(401)).starts_with("`https://hub` does not show `a/b@main` without the right token (401); check")
        );
        assert!(text(Some(403)).ends_with("accept the terms on `https://hub/a/b` with the account of HF_TOKEN"));
        assert!(text(Some(404)).starts_with("`https://hub` has no `a/b@main` (404)"));
        assert!(text(Some(429)).starts_with("`https://hub` asks to wait"));
        assert!(text(Some(503)).starts_with("`https://hub` answers 503 when asked for `a/b@main`"));
        assert!(text(None).starts_with("cannot fetch `a/b@main` from `https://hub`: no route to host"));
    }

    #[test]
    fn only_one_layout_is_fetched() {
        let files = [
            "model-00001-of-00002.safetensors",
            "consolidated.safetensors",
            "model.fp16.safetensors",
            "config.json",
            "pytorch_model.bin",
            "onnx/config.json",
            "original/model.safetensors",
            "../evil.json",
            "modeling.py",
            "tokenizer.model",
            "model.safetensors.index.json",
        ];
        let expected =
            ["config.json", "model.safetensors.index.json", "tokenizer.model", "model-00001-of-00002.safetensors"];
        assert_eq!(wanted(&files), expected);
        let vila = ["llm/model.safetensors", "config.json", "vision_tower/other.safetensors", "llm/a/b.json"];
        assert_eq!(wanted(&vila), ["config.json", "llm/model.safetensors", "vision_tower/other.safetensors"]);
    }
}
