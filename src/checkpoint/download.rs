//! Fetching a model of the hub into the local cache, in the layout that the hub's own tools use.
use super::Options;
use super::cache::HubId;
use super::containment::not_plain;
use super::hub::{Download, HubError};
use super::weights::is_bin;
use hf_hub::api::sync::{ApiBuilder, ApiError};
use hf_hub::{Cache, Repo, RepoType};
use std::path::{Path, PathBuf};

const PUBLIC_HUB: &str = "https://huggingface.co";

/// Fetches what the cache lacks of `id`; the folder with its files.
pub(crate) fn fetch(id: &HubId, cache: &Path, options: &Options<'_>) -> Result<PathBuf, HubError> {
    let endpoint = options.hub.endpoint.as_deref().unwrap_or(PUBLIC_HUB);
    let failed = |error: ApiError| {
        let cause = error.to_string();
        let status = match error {
            ApiError::RequestError(error) => error.into_response().map(|response| response.status()),
            _ => None,
        };
        from_answer(endpoint, id, status, cause)
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
    let odd = |cause: String| from_answer(endpoint, id, None, cause);
    if not_plain(&info.sha).is_some() {
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
struct Report<'a> {
    file: String,
    done: u64,
    total: u64,
    callback: Option<&'a dyn Fn(Download<'_>)>,
}

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

/// The files worth fetching, weights last: texts of the top folder and of the folders below it, and the weights of one
/// layout: safetensors, or PyTorch files where there are none.
fn wanted<'n>(files: &[&'n str]) -> Vec<&'n str> {
    let plain = |name: &str| name.split('/').all(|part| not_plain(part).is_none());
    let has_safetensors = files.iter().any(|name| name.ends_with(".safetensors"));
    let is_weights = |path: &str| match has_safetensors {
        true => path.ends_with(".safetensors"),
        false => is_bin(path.rsplit('/').next().unwrap_or(path)),
    };
    let is_usual = |name: &str| name == "model.safetensors" || name.starts_with("model-") || is_bin(name);
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
        if name == "pytorch_model.bin.index.json" && has_safetensors {
            return false;
        }
        name == "tokenizer.model" || [".json", ".jinja", ".txt"].iter().any(|ending| name.ends_with(ending))
    };
    let mut names: Vec<&str> = files.iter().copied().filter(|name| kept(name)).collect();
    names.sort_by_key(|name| (is_weights(name), *name));
    names
}

/// From what the hub answered (`None`: it did not) and what the client says about it.
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

#[cfg(test)]
mod tests {
    use super::super::{Checkpoint, HubSettings};
    use super::*;
    use std::cell::Cell;
    use std::ffi::OsString;
    use std::io::{BufRead, BufReader, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::{Arc, Mutex};

    #[test]
    fn answers_become_errors_with_hints() {
        let id = HubId::parse("a/b").unwrap();
        let error = |status| from_answer("https://hub", &id, status, "no route to host".into());
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
        let old = ["pytorch_model-1.bin", "pytorch_model.bin.index.json", "training_args.bin", "mm_projector.bin"];
        assert_eq!(wanted(&old), ["pytorch_model.bin.index.json", "mm_projector.bin", "pytorch_model-1.bin"]);
        let vila = ["llm/model.safetensors", "config.json", "vision_tower/other.safetensors", "llm/a/b.json"];
        assert_eq!(wanted(&vila), ["config.json", "llm/model.safetensors", "vision_tower/other.safetensors"]);
    }

    /// One answer of a hub that has llava-hf as org/name.
    fn answer(mut stream: TcpStream, log: &Mutex<Vec<String>>) -> std::io::Result<()> {
        let mut lines = BufReader::new(stream.try_clone()?).lines();
        let mut request = String::new();
        for line in lines.by_ref() {
            let line = line?;
            if line.is_empty() {
                break;
            }
            request += &line.to_ascii_lowercase();
            request.push('\n');
        }
        let path = request.split(' ').nth(1).unwrap_or_default();
        let (status, range, body) = match path.strip_prefix("/org/name/resolve/c0ffee/") {
            Some(name) => {
                let whole =
                    std::fs::read(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fixtures/llava-hf")).join(name))?;
                let probe = request.contains("range: bytes=0-0\n");
                let range =
                    format!("content-range: bytes 0-{}/{}\r\n", if probe { 0 } else { whole.len() - 1 }, whole.len());
                ("206 Partial Content", range, if probe { whole[..1].to_vec() } else { whole })
            }
            None if path == "/api/models/org/name/revision/main" => {
                let files = ["config.json", "modeling.py", "model.safetensors", "pytorch_model.bin"];
                let files = files.map(|name| format!(r#"{{"rfilename":"{name}"}}"#)).join(",");
                ("200 OK", String::new(), format!(r#"{{"sha":"c0ffee","siblings":[{files}]}}"#).into_bytes())
            }
            None if path.contains("secret") => ("401 Unauthorized", String::new(), Vec::new()),
            None => ("404 Not Found", String::new(), Vec::new()),
        };
        let etag = path.rsplit('/').next().unwrap_or_default().replace('.', "-");
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-length: {}\r\netag: \"{etag}\"\r\nx-repo-commit: c0ffee\r\n{range}connection: close\r\n\r\n",
            body.len()
        );
        log.lock().unwrap().push(request.clone());
        stream.write_all(head.as_bytes())?;
        stream.write_all(&body)
    }

    #[test]
    fn a_model_is_fetched_once_with_the_token_and_without_its_code() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let log = requests.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                drop(answer(stream, &log));
            }
        });
        let temporary = tempfile::tempdir().unwrap();
        let settings = |endpoint: &str| {
            let (home, endpoint) = (OsString::from(temporary.path()), OsString::from(endpoint));
            HubSettings::from_variables(move |name| match name {
                "HF_HOME" => Some(home.clone()),
                "HF_ENDPOINT" => Some(endpoint.clone()),
                "HF_TOKEN" => Some("hf_test".into()),
                _ => None,
            })
        };
        let arrived = Cell::new((0, 0));
        let progress = |download: Download<'_>| {
            if download.file == "model.safetensors" {
                arrived.set((download.done, download.total));
            }
        };
        let options = Options { hub: settings(&endpoint), progress: Some(&progress) };
        let checkpoint = Checkpoint::open("org/name", &options).unwrap();
        assert_eq!(checkpoint.tensors().len(), 80);
        assert_eq!(arrived.get(), (506208, 506208));
        assert_eq!(std::fs::read(temporary.path().join("hub/models--org--name/refs/main")).unwrap(), b"c0ffee");
        let seen = requests.lock().unwrap().clone();
        assert!(seen.iter().all(|request| request.contains("authorization: bearer hf_test\n")), "{seen:?}");
        assert!(!seen.iter().any(|request| request.contains("modeling.py") || request.contains(".bin")), "{seen:?}");
        Checkpoint::open("org/name", &options).unwrap();
        assert_eq!(requests.lock().unwrap().len(), seen.len());

        let refused = |id: &str, options: &Options<'_>| Checkpoint::open(id, options).unwrap_err().to_string();
        assert_eq!(
            refused("org/secret", &options),
            format!("`{endpoint}` does not show `org/secret@main` without the right token (401)")
        );
        assert_eq!(refused("org/name@dev", &options), format!("`{endpoint}` has no `org/name@dev` (404)"));
        let closed = Options { hub: settings("http://127.0.0.1:9"), progress: None };
        let text = refused("org/other", &closed);
        assert!(text.starts_with("cannot fetch `org/other@main` from `http://127.0.0.1:9`: request error:"), "{text}");
    }
}
