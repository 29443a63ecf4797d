use std::path::PathBuf;

/// Why a picture or a prompt could not be made into network inputs.
#[derive(Debug, thiserror::Error)]
pub enum ProcessorError {
    /// A file cannot be read.
    #[error("cannot read `{path}`")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    /// A file of the processor folder is not what its name says.
    #[error("cannot parse `{path}`: {reason}")]
    Parse { path: PathBuf, reason: String },
    /// A setting of a configuration file has a value that cannot be used.
    #[error("`{setting}` in {file}: found `{found}`, wanted {wanted}")]
    Setting { file: &'static str, setting: String, found: String, wanted: String },
    /// A picture is refused.
    #[error("picture `{name}`: {reason}")]
    Picture { name: String, reason: String },
    /// The tokenizer failed on a text.
    #[error("cannot tokenize: {0}")]
    Tokenize(String),
    /// Ids that the tokenizer cannot turn into text.
    #[error("cannot decode ids: {0}")]
    Decode(String),
    /// A chat was asked for and the checkpoint brings no template of that name.
    #[error("no chat template in `{folder}`")]
    NoChatTemplate { folder: PathBuf },
    /// The chat template cannot be rendered.
    #[error("chat template: {reason}")]
    ChatTemplate { reason: String },
    /// Image placeholders and pictures do not pair up.
    #[error("found `{found}` image placeholders in the prompt, wanted one for each of `{wanted}` pictures")]
    Placeholders { found: usize, wanted: usize },
    /// The model's pictures have a fixed place.
    #[error("found `{found}` image placeholders in the prompt, wanted none: pictures come before the whole prompt")]
    UnwantedPlaceholders { found: usize },
    /// Pictures were given to a model that reads text alone.
    #[error("found `{found}` pictures, wanted none: this model reads text only")]
    NoVision { found: usize },
    /// The prompt has no tokens.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// The prompt does not fit the engine's profile.
    #[error("the prompt has `{found}` tokens (of these `{picture_tokens}` for pictures), the engine takes `{limit}`")]
    PromptTooLong { found: usize, picture_tokens: usize, limit: usize },
    /// An id that the embedding table does not have.
    #[error("token id `{id}` is outside the vocabulary of `{vocabulary}`")]
    IdOutOfRange { id: u32, vocabulary: u32 },
    /// More prompt table rows than an id can address.
    #[error("picture rows up to `{rows}` on a vocabulary of `{vocabulary}` do not fit a 32-bit id")]
    TooManyRows { rows: usize, vocabulary: u32 },
}

impl ProcessorError {
    pub(super) fn picture(name: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Picture { name: name.into(), reason: reason.into() }
    }

    /// What the user can do about it, where that is known.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Read { path, .. } if path.ends_with("tokenizer.json") => {
                Some("the model came without a tokenizer: build it again with --tokenizer DIR".to_owned())
            }
            Self::Read { path, .. } => match path.extension() {
                Some(extension) if extension == "json" => {
                    Some("build the engine directory again: its processor folder is incomplete".to_owned())
                }
                _ => None,
            },
            Self::Parse { .. } => Some("copy the file from the checkpoint again".to_owned()),
            Self::Picture { .. } => Some("convert or scale the picture, to a PNG of ordinary size".to_owned()),
            Self::NoChatTemplate { .. } => Some("leave out --chat and write the whole prompt".to_owned()),
            Self::Placeholders { found: 0, .. } => None,
            Self::Placeholders { .. } => {
                Some("write one placeholder per picture, or none at all to get the model's usual prompt".to_owned())
            }
            Self::UnwantedPlaceholders { .. } => Some("leave the placeholders out of the prompt".to_owned()),
            Self::NoVision { .. } => Some("leave out --image".to_owned()),
            Self::PromptTooLong { found, .. } => Some(format!("build with --max-input-len {found} or more")),
            Self::IdOutOfRange { .. } => Some("the tokenizer and the weights are not of one checkpoint".to_owned()),
            _ => None,
        }
    }
}
