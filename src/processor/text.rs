//! Text to ids and back.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tokenizers::{AddedToken, Tokenizer};

use super::error::ProcessorError;
use super::folder::{find, read_json};
use super::generation::Generation;
use super::sentencepiece;
use super::stream::TextStream;

/// The tokenizer of a checkpoint and the ids that end its answers.
#[derive(Debug)]
pub struct TextProcessor {
    tokenizer: Tokenizer,
    eos_ids: Vec<u32>,
}

impl TextProcessor {
    /// Reads tokenizer.json, or where there is none tokenizer.model or spiece.model, with tokenizer_config.json and generation_config.json where they are there.
    ///
    /// Special tokens around a text (BOS) are what tokenizer.json's post-processor adds; the old `add_bos_token` of
    /// tokenizer_config.json is not looked at.
    ///
    /// # Errors
    /// tokenizer.json is missing or malformed, or another file is malformed or contradicts it.
    pub fn open(folder: &Path) -> Result<Self, ProcessorError> {
        Self::open_parts(&[folder])
    }

    /// As [`TextProcessor::open`] where the files lie in several folders: the first folder that has a file gives it.
    ///
    /// # Errors
    /// As [`TextProcessor::open`].
    pub fn open_parts(folders: &[&Path]) -> Result<Self, ProcessorError> {
        let config = read_json(folders, "tokenizer_config.json")?;
        let (path, bytes) = definition(folders, config.as_ref())?;
        let mut tokenizer = Tokenizer::from_bytes(bytes)
            .map_err(|error| ProcessorError::Parse { path: path.clone(), reason: error.to_string() })?;
        // Kept from training; HF resets both with each call.
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| ProcessorError::Parse { path, reason: error.to_string() })?;
        if let Some(config) = &config {
            add_tokens(&mut tokenizer, config)?;
        }
        let mut eos_ids = Generation::open_parts(folders)?.end_ids;
        if eos_ids.is_empty() {
            let token = config.as_ref().and_then(|config| special_token(config, "eos_token"));
            eos_ids.extend(token.and_then(|token| tokenizer.token_to_id(&token)));
        }
        Ok(Self { tokenizer, eos_ids })
    }

    /// The ids of a text, with what the post-processor puts around it where `add_special_tokens`.
    ///
    /// # Errors
    /// The tokenizer has no token for a part of the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ProcessorError> {
        let encoding = self
            .tokenizer
            .encode(text, add_special_tokens)
            .map_err(|error| ProcessorError::Tokenize(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of ids; special tokens are skipped, ids that the tokenizer does not know too.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn decode(&self, ids: &[u32]) -> Result<String, ProcessorError> {
        self.tokenizer.decode(ids, true).map_err(|error| ProcessorError::Decode(error.to_string()))
    }

    /// A decoder for ids that come one by one.
    pub fn stream(&self) -> TextStream<'_> {
        TextStream::new(self)
    }

    /// The ids that end an answer: generation_config.json's, else the tokenizer's `eos_token`; may be empty.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The id of a token's exact text.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.tokenizer.token_to_id(token)
    }

    /// The exact text of a token.
    pub fn token(&self, id: u32) -> Option<String> {
        self.tokenizer.id_to_token(id)
    }
}

/// The tokenizer's JSON and the file that it comes from.
fn definition(folders: &[&Path], config: Option<&Value>) -> Result<(PathBuf, Vec<u8>), ProcessorError> {
    let path = find(folders, "tokenizer.json");
    let pieces = ["tokenizer.model", "spiece.model"].map(|name| find(folders, name));
    let pieces = pieces.into_iter().find(|pieces| pieces.exists());
    let read =
        |path: &Path| std::fs::read(path).map_err(|source| ProcessorError::Read { path: path.to_path_buf(), source });
    let Some(pieces) = pieces.filter(|_| !path.exists()) else {
        let bytes = read(&path)?;
        return Ok((path, bytes));
    };
    // By the name that T5's files have.
    let t5 = pieces.ends_with("spiece.model");
    match sentencepiece::tokenizer(&read(&pieces)?, config, t5) {
        Ok(json) => Ok((pieces, json.to_string().into_bytes())),
        Err(reason) => Err(ProcessorError::Parse { path: pieces, reason }),
    }
}

/// Adds the tokens that tokenizer_config.json lists and tokenizer.json lacks.
fn add_tokens(tokenizer: &mut Tokenizer, config: &Value) -> Result<(), ProcessorError> {
    let Some(listed) = config.get("added_tokens_decoder").and_then(Value::as_object) else {
        return Ok(());
    };
    let wrong = |id: &str, found: String, wanted: &str| ProcessorError::Setting {
        file: "tokenizer_config.json",
        setting: format!("added_tokens_decoder.{id}"),
        found,
        wanted: wanted.to_owned(),
    };
    let mut missing = Vec::new();
    for (id, entry) in listed {
        let content = entry.get("content").and_then(Value::as_str);
        let (Ok(number), Some(content)) = (id.parse::<u32>(), content) else {
            return Err(wrong(id, entry.to_string(), "a number as key and a content"));
        };
        if tokenizer.token_to_id(content).is_none() {
            missing.push((number, content, entry));
        }
    }
    missing.sort_by_key(|(number, ..)| *number);
    for (number, content, entry) in missing {
        let flag = |name: &str| entry.get(name).and_then(Value::as_bool).unwrap_or(false);
        let special = flag("special");
        let token = AddedToken::from(content, special)
            .lstrip(flag("lstrip"))
            .rstrip(flag("rstrip"))
            .single_word(flag("single_word"))
            .normalized(flag("normalized"));
        let added = if special { tokenizer.add_special_tokens([token]) } else { tokenizer.add_tokens([token]) };
        let found = tokenizer.token_to_id(content);
        if added.is_err() || found != Some(number) {
            let found = found.map_or("no id".to_owned(), |found| found.to_string());
            return Err(wrong(&number.to_string(), found, "the id that tokenizer.json leaves free next"));
        }
    }
    Ok(())
}

/// A special token of tokenizer_config.json: a string, or an object with its content.
pub(super) fn special_token(config: &Value, name: &str) -> Option<String> {
    let value = config.get(name)?;
    let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
    Some(text.to_owned())
}
