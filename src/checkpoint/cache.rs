//! Ids of the hub and its local cache (`models--ORG--NAME/{refs,snapshots,blobs}`), which is only ever read here.
use super::containment::not_plain;
use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

/// What the environment says about the hub. `Default` is an empty environment: no cache, the public hub, online.
#[derive(Clone, Default)]
pub struct HubSettings {
    /// The folder of `models--ORG--NAME` folders; `None` where not even a home folder is known.
    pub cache: Option<PathBuf>,
    /// Another address than the public hub's.
    pub endpoint: Option<String>,
    pub offline: bool,
    token: Option<String>,
    token_path: Option<PathBuf>,
}

impl HubSettings {
    pub fn from_environment() -> HubSettings {
        Self::from_variables(|name| std::env::var_os(name))
    }

    /// Reads HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME, HOME, HF_ENDPOINT, HF_HUB_OFFLINE, HF_TOKEN and HF_TOKEN_PATH.
    pub fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> HubSettings {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &str| set(name)?.into_string().ok().map(|value| value.trim().to_owned());
        let user = set("HOME").map(PathBuf::from);
        let path = |name: &str| {
            let path = PathBuf::from(set(name)?);
            match (path.strip_prefix("~"), &user) {
                (Ok(below), Some(user)) => Some(user.join(below)),
                _ => Some(path),
            }
        };
        let general = path("XDG_CACHE_HOME").or_else(|| Some(user.as_ref()?.join(".cache")));
        let home = path("HF_HOME").or_else(|| Some(general?.join("huggingface")));
        let truth = text("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
        HubSettings {
            cache: path("HF_HUB_CACHE").or_else(|| Some(home.as_ref()?.join("hub"))),
            endpoint: text("HF_ENDPOINT").map(|endpoint| endpoint.trim_end_matches('/').to_owned()),
            offline: ["1", "ON", "YES", "TRUE"].contains(&truth.as_str()),
            token: text("HF_TOKEN").filter(|token| !token.is_empty()),
            token_path: path("HF_TOKEN_PATH").or_else(|| Some(home?.join("token"))),
        }
    }

    /// HF_TOKEN, or the contents of the token file.
    pub fn token(&self) -> Option<String> {
        let from_file = || std::fs::read_to_string(self.token_path.as_ref()?).ok();
        let token = self.token.clone().or_else(from_file)?.trim().to_owned();
        (!token.is_empty()).then_some(token)
    }
}

/// Shows everything but the token.
impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let HubSettings { cache, endpoint, offline, .. } = self;
        write!(f, "HubSettings {{ cache: {cache:?}, endpoint: {endpoint:?}, offline: {offline}, .. }}")
    }
}

/// A model of the hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HubId {
    pub(crate) repository: String,
    pub(crate) revision: String,
}

impl HubId {
    /// Reads `org/name` or `org/name@revision`; a revision may have slashes (`refs/pr/1`), never a `..`.
    pub(crate) fn parse(text: &str) -> Option<HubId> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, "main"));
        let (organization, name) = repository.split_once('/')?;
        let word = |word: &str| {
            let plain = word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            plain && not_plain(word).is_none() && !word.starts_with(['.', '-']) && !word.contains("--")
        };
        let good = word(organization) && word(name) && revision.split('/').all(|part| not_plain(part).is_none());
        good.then(|| HubId { repository: repository.to_owned(), revision: revision.to_owned() })
    }

    /// The name of its folder in the cache.
    pub(crate) fn folder_name(&self) -> String {
        format!("models--{}", self.repository.replace('/', "--"))
    }

    /// The folder of the revision's files in the cache, where it is there.
    pub(crate) fn snapshot(&self, cache: &std::path::Path) -> Option<PathBuf> {
        let entry = cache.join(self.folder_name());
        let commit = match std::fs::read_to_string(entry.join("refs").join(&self.revision)) {
            Ok(commit) => commit.trim().to_owned(),
            Err(_) => self.revision.clone(),
        };
        let snapshot = entry.join("snapshots").join(&commit);
        (not_plain(&commit).is_none() && snapshot.is_dir()).then_some(snapshot)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.repository, self.revision)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn settings(variables: &[(&str, &str)]) -> HubSettings {
        let find = |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        HubSettings::from_variables(find)
    }

    #[test]
    fn the_nearest_variable_names_the_cache() {
        let cache = |variables: &[(&str, &str)]| settings(variables).cache.map(|path| path.display().to_string());
        let mut variables = vec![("HOME", "/home/u"), ("HF_HUB_CACHE", "")];
        assert_eq!(cache(&[]), None);
        assert_eq!(cache(&variables).unwrap(), "/home/u/.cache/huggingface/hub");
        variables.push(("XDG_CACHE_HOME", "/x"));
        assert_eq!(cache(&variables).unwrap(), "/x/huggingface/hub");
        variables.push(("HF_HOME", "~/hf"));
        assert_eq!(cache(&variables).unwrap(), "/home/u/hf/hub");
        variables.remove(1);
        variables.push(("HF_HUB_CACHE", "/c"));
        assert_eq!(cache(&variables).unwrap(), "/c");
    }

    #[test]
    fn tokens_come_from_variable_or_file_and_stay_secret() {
        let temporary = tempfile::tempdir().unwrap();
        let home = temporary.path().to_str().unwrap();
        assert_eq!(settings(&[("HF_HOME", home)]).token(), None);
        fs::write(temporary.path().join("token"), "hf_file\n").unwrap();
        assert_eq!(settings(&[("HF_HOME", home)]).token().unwrap(), "hf_file");
        let both = settings(&[("HF_HOME", home), ("HF_TOKEN", " hf_secret ")]);
        assert_eq!(both.token().unwrap(), "hf_secret");
        assert!(!format!("{both:?}").contains("secret"));
        let path = temporary.path().join("token");
        assert_eq!(settings(&[("HF_TOKEN_PATH", path.to_str().unwrap())]).token().unwrap(), "hf_file");
    }

    #[test]
    fn ids_are_told_from_paths() {
        let id = HubId::parse("llava-hf/llava-1.5-7b-hf@refs/pr/3").unwrap();
        assert_eq!((id.repository.as_str(), id.revision.as_str()), ("llava-hf/llava-1.5-7b-hf", "refs/pr/3"));
        assert_eq!(id.folder_name(), "models--llava-hf--llava-1.5-7b-hf");
        assert_eq!(HubId::parse("a/b").unwrap().to_string(), "a/b@main");
        for text in
            ["a", "a/b/c", "./a", "../a", "/a", "a/", "a/..", "a/b@", "a/b@../x", "a/b@/x", "a--b/c", "a b/c", ""]
        {
            assert_eq!(HubId::parse(text), None, "{text}");
        }
    }

    #[test]
    fn revisions_resolve_through_refs_or_as_commits() {
        let temporary = tempfile::tempdir().unwrap();
        let entry = temporary.path().join("models--a--b");
        fs::create_dir_all(entry.join("refs/refs/pr")).unwrap();
        fs::create_dir_all(entry.join("snapshots/c0ffee")).unwrap();
        fs::write(entry.join("refs/main"), "c0ffee").unwrap();
        fs::write(entry.join("refs/refs/pr/1"), "c0ffee\n").unwrap();
        fs::write(entry.join("refs/evil"), "../../../other").unwrap();
        let found = |text: &str| HubId::parse(text).unwrap().snapshot(temporary.path());
        let wanted = Some(entry.join("snapshots/c0ffee"));
        assert_eq!(
            [found("a/b"), found("a/b@refs/pr/1"), found("a/b@c0ffee")],
            [wanted.clone(), wanted.clone(), wanted]
        );
        assert_eq!([found("a/b@evil"), found("a/b@dev"), found("a/c")], [None, None, None]);
    }
}
