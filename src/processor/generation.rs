//! What `generation_config.json` asks of an answer.
use super::ProcessorError;
use super::folder::read_json;
use serde_json::Value;
use std::path::Path;

const FILE: &str = "generation_config.json";

/// The file's settings that are followed; those that it lacks are `None` or empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generation {
    pub end_ids: Vec<u32>,
    /// Tokens of an answer at most.
    pub max_length: Option<usize>,
    pub rules: TokenRules,
}

/// Where another token than the likeliest is taken.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenRules {
    /// Behind the token that a decoder starts with.
    pub forced_first: Option<u32>,
    /// In the place of the last token that an answer may have.
    pub forced_last: Option<u32>,
    /// Never taken.
    pub suppressed: Vec<u32>,
    /// Not taken at the beginning of an answer.
    pub suppressed_first: Vec<u32>,
}

impl TokenRules {
    /// # Errors
    /// An id that the model does not have.
    pub fn check(&self, vocabulary: u32) -> Result<(), ProcessorError> {
        let forced = self.forced_first.iter().chain(&self.forced_last);
        let all = forced.chain(&self.suppressed).chain(&self.suppressed_first);
        match all.copied().find(|&id| id >= vocabulary) {
            Some(id) => Err(ProcessorError::IdOutOfRange { id, vocabulary }),
            None => Ok(()),
        }
    }
}

impl Generation {
    /// The file of the first folder that has it.
    ///
    /// # Errors
    /// A file that is unreadable or malformed, or a setting that is not what it must be.
    pub fn open_parts(folders: &[&Path]) -> Result<Generation, ProcessorError> {
        let Some(file) = read_json(folders, FILE)? else { return Ok(Generation::default()) };
        let ids = |setting: &str| ids(&file, setting);
        let rules = TokenRules {
            forced_first: one(&file, "forced_bos_token_id", ids("forced_bos_token_id")?)?,
            // Of several transformers' scores are equal, and the first of equals is taken.
            forced_last: ids("forced_eos_token_id")?.into_iter().min(),
            suppressed: ids("suppress_tokens")?,
            suppressed_first: ids("begin_suppress_tokens")?,
        };
        Ok(Generation { end_ids: ids("eos_token_id")?, max_length: max_length(&file)?, rules })
    }
}

/// A setting's value; null counts as missing.
fn value<'f>(file: &'f Value, setting: &str) -> Option<&'f Value> {
    file.get(setting).filter(|value| !value.is_null())
}

fn wrong(setting: &str, found: &Value, wanted: &str) -> ProcessorError {
    ProcessorError::Setting {
        file: FILE,
        setting: setting.to_owned(),
        found: found.to_string(),
        wanted: wanted.to_owned(),
    }
}

fn ids(file: &Value, setting: &str) -> Result<Vec<u32>, ProcessorError> {
    let Some(value) = value(file, setting) else { return Ok(Vec::new()) };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match value {
        Value::Array(items) => items.iter().map(id).collect(),
        _ => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| wrong(setting, value, "an id or a list of ids"))
}

fn one(file: &Value, setting: &str, ids: Vec<u32>) -> Result<Option<u32>, ProcessorError> {
    match ids[..] {
        [] => Ok(None),
        [id] => Ok(Some(id)),
        _ => Err(wrong(setting, &file[setting], "one id")),
    }
}

fn max_length(file: &Value) -> Result<Option<usize>, ProcessorError> {
    let Some(value) = value(file, "max_length") else { return Ok(None) };
    let length = value.as_u64().and_then(|length| usize::try_from(length).ok()).filter(|length| *length > 0);
    length.map(Some).ok_or_else(|| wrong("max_length", value, "a number above 0"))
}
