use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{ChatTemplate, Generation, ImageProcessor, ProcessorError, TextProcessor};

/// Every file of a checkpoint that the processor folder takes over, where the checkpoint has it.
pub const FILES: [&str; 10] = [
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
];

/// All that a processor folder holds, read once.
#[derive(Debug)]
pub struct Processor {
    /// Present where the folder has image settings.
    pub image: Option<ImageProcessor>,
    /// Tokenizer and end ids.
    pub text: TextProcessor,
    /// The chat template, where the checkpoint brings one.
    pub chat: Option<ChatTemplate>,
    pub generation: Generation,
}

impl Processor {
    /// Reads the processor folder.
    ///
    /// # Errors
    /// tokenizer.json is missing, or a file is unreadable, malformed, or holds a setting that cannot be followed.
    pub fn open(folder: &Path) -> Result<Self, ProcessorError> {
        Self::open_parts(&[folder])
    }

    /// As [`Processor::open`] where the files lie in several folders: the first folder that has a file gives it.
    ///
    /// # Errors
    /// As [`Processor::open`].
    pub fn open_parts(folders: &[&Path]) -> Result<Self, ProcessorError> {
        let preprocessor = read_json(folders, "preprocessor_config.json")?;
        let processor = read_json(folders, "processor_config.json")?;
        // A checkpoint with more than a tokenizer: HF renders its chats by another rule.
        let multimodal = preprocessor.is_some() || processor.is_some();
        let nested = processor.as_ref().is_some_and(|processor| processor.get("image_processor").is_some());
        let image = if preprocessor.is_some() || nested {
            Some(ImageProcessor::from_configs(preprocessor.as_ref(), processor.as_ref())?)
        } else {
            None
        };
        Ok(Self {
            image,
            text: TextProcessor::open_parts(folders)?,
            chat: ChatTemplate::open_parts(folders, multimodal)?,
            generation: Generation::open_parts(folders)?,
        })
    }
}

/// Where a file lies: in the first folder that has it, else in the first.
pub(super) fn find(folders: &[&Path], name: &str) -> PathBuf {
    let has = folders.iter().find(|folder| folder.join(name).exists());
    has.or(folders.first()).map_or_else(|| name.into(), |folder| folder.join(name))
}

/// A JSON file of the folders; `None` where there is no such file.
pub(super) fn read_json(folders: &[&Path], name: &str) -> Result<Option<Value>, ProcessorError> {
    let path = find(folders, name);
    let Some(text) = read_text(folders, name)? else {
        return Ok(None);
    };
    let parsed =
        serde_json::from_str(&text).map_err(|error| ProcessorError::Parse { path, reason: error.to_string() })?;
    Ok(Some(parsed))
}

/// A text file of the folders; `None` where there is no such file.
pub(super) fn read_text(folders: &[&Path], name: &str) -> Result<Option<String>, ProcessorError> {
    let path = find(folders, name);
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ProcessorError::Read { path, source }),
    }
}
