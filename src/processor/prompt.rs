//! The language input of one request: a prompt's ids, with pictures as ids beyond the vocabulary.

use serde::{Deserialize, Serialize};

use super::error::ProcessorError;
use super::text::TextProcessor;

/// How a family words a question about pictures that names no placeholder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptTemplate {
    /// The prompt itself, the pictures before it.
    Plain,
    /// `USER: <image>\n{prompt} ASSISTANT:`
    #[default]
    Llava,
    /// The prompt itself (`Question: ... Answer:`, or nothing for a caption); the pictures come before all of it, the
    /// tokenizer's BOS included, and no token stands for them.
    Blip2,
    /// Vicuna's words around the same. Pictures have no id: the text is split at `<image>` and each part is tokenized on
    /// its own.
    Vila,
}

/// What stands for a picture in the text of a prompt that is split.
pub const PLACEHOLDER: &str = "<image>";
/// VILA's `vicuna_v1` conversation.
const VICUNA: &str = "A chat between a curious user and an artificial intelligence assistant. The assistant gives \
                      helpful, detailed, and polite answers to the user's questions.";

impl PromptTemplate {
    /// `prompt` about `pictures` pictures, in the family's words.
    pub fn apply(self, prompt: &str, placeholder: &str, pictures: usize) -> String {
        match self {
            Self::Plain | Self::Blip2 => format!("{}{prompt}", placeholder.repeat(pictures)),
            Self::Llava => {
                let placeholders = format!("{placeholder}\n").repeat(pictures);
                format!("USER: {placeholders}{prompt} ASSISTANT:")
            }
            Self::Vila => format!("{VICUNA} {}", Self::Llava.apply(prompt, placeholder, pictures)),
        }
    }
}

/// What a model says about its prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// Used where a prompt names no placeholder.
    pub template: PromptTemplate,
    /// The placeholder's id. Without one, and in BLIP-2 always, the features go before the text, or where it is split.
    pub image_token_id: Option<u32>,
    /// Rows of the prompt table that one picture takes; 0 for a model that reads text only.
    pub features_per_picture: usize,
    /// Rows of the embedding table.
    pub vocabulary: u32,
    /// The longest input of the engine's profile, in tokens.
    pub maximum_length: Option<usize>,
}

/// One request of a batch.
#[derive(Debug, Clone, Copy)]
pub struct PromptRequest<'a> {
    /// The prompt, with or without placeholders.
    pub prompt: &'a str,
    /// Pictures of this request.
    pub pictures: usize,
    /// Pictures of the requests before it in the batch: its rows of the prompt table start after theirs.
    pub first_picture: usize,
    /// Whether the tokenizer adds its special tokens (BOS); a rendered chat may bring its own.
    pub add_special_tokens: bool,
}

/// The input of the language network for one request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LanguageInput {
    /// Ids; `vocabulary + row` stands for that row of the batch's prompt table.
    pub ids: Vec<i32>,
    /// How many of them are rows of the prompt table.
    pub picture_tokens: usize,
}

impl PromptSettings {
    /// The language input of one request.
    ///
    /// # Errors
    /// The prompt is empty or too long, its placeholders and the pictures do not pair up, or the tokenizer gives an id
    /// outside the vocabulary.
    pub fn build(&self, text: &TextProcessor, request: PromptRequest<'_>) -> Result<LanguageInput, ProcessorError> {
        let pictures = request.pictures;
        if pictures > 0 && self.features_per_picture == 0 {
            return Err(ProcessorError::NoVision { found: pictures });
        }
        if pictures == 0 && request.prompt.trim().is_empty() {
            return Err(ProcessorError::EmptyPrompt);
        }
        let rows = self.rows(request)?;
        let texts = self.texts(text, request)?;
        // A text before each picture and one behind the last.
        let found = texts.len() - 1;
        if found != pictures {
            return Err(ProcessorError::Placeholders { found, wanted: pictures });
        }
        let mut input = LanguageInput { ids: Vec::new(), picture_tokens: rows.len() };
        let mut rows = rows.chunks(self.features_per_picture.max(1));
        for (number, tokens) in texts.into_iter().enumerate() {
            if number > 0 {
                input.ids.extend(rows.next().unwrap_or_default());
            }
            for token in tokens {
                input.ids.push(self.checked(token)?);
            }
        }
        let found = input.ids.len();
        if found == 0 {
            return Err(ProcessorError::EmptyPrompt);
        }
        match self.maximum_length {
            Some(limit) if found > limit => {
                Err(ProcessorError::PromptTooLong { found, picture_tokens: input.picture_tokens, limit })
            }
            _ => Ok(input),
        }
    }

    /// Ids of the texts between the pictures, at least one.
    fn texts(&self, text: &TextProcessor, request: PromptRequest<'_>) -> Result<Vec<Vec<u32>>, ProcessorError> {
        let PromptRequest { prompt, pictures, add_special_tokens, .. } = request;
        match (self.image_token_id, self.template) {
            (placeholder, PromptTemplate::Blip2) => {
                let tokens = text.encode(prompt, add_special_tokens)?;
                let found = tokens.iter().filter(|token| Some(**token) == placeholder).count();
                if found > 0 {
                    return Err(ProcessorError::UnwantedPlaceholders { found });
                }
                let mut texts = vec![Vec::new(); pictures];
                texts.push(tokens);
                Ok(texts)
            }
            (Some(placeholder), template) => {
                let mut tokens = text.encode(prompt, add_special_tokens)?;
                if pictures > 0 && !tokens.contains(&placeholder) {
                    let name = text
                        .token(placeholder)
                        .ok_or(ProcessorError::IdOutOfRange { id: placeholder, vocabulary: self.vocabulary })?;
                    tokens = text.encode(&template.apply(prompt, &name, pictures), add_special_tokens)?;
                }
                Ok(tokens.split(|token| *token == placeholder).map(<[u32]>::to_vec).collect())
            }
            (None, PromptTemplate::Vila) => {
                let worded = pictures > 0 && !prompt.contains(PLACEHOLDER);
                let prompt = if worded { &self.template.apply(prompt, PLACEHOLDER, pictures) } else { prompt };
                let parts = prompt.split(PLACEHOLDER).enumerate();
                parts.map(|(number, part)| text.encode(part, add_special_tokens && number == 0)).collect()
            }
            (None, _) => {
                let mut texts = vec![Vec::new(); pictures];
                texts.push(text.encode(prompt, add_special_tokens)?);
                Ok(texts)
            }
        }
    }

    /// The fake ids of all the request's pictures, in order.
    fn rows(&self, request: PromptRequest<'_>) -> Result<Vec<i32>, ProcessorError> {
        let each = self.features_per_picture;
        let first = request.first_picture.saturating_mul(each);
        let end = request.first_picture.saturating_add(request.pictures).saturating_mul(each);
        let id = |row: usize| i32::try_from(row.checked_add(usize::try_from(self.vocabulary).ok()?)?).ok();
        match (id(first), id(end)) {
            (Some(first), Some(end)) => Ok((first..end).collect()),
            _ => Err(ProcessorError::TooManyRows { rows: end, vocabulary: self.vocabulary }),
        }
    }

    fn checked(&self, id: u32) -> Result<i32, ProcessorError> {
        let vocabulary = self.vocabulary;
        let inside = Some(id).filter(|id| *id < vocabulary);
        inside.and_then(|id| i32::try_from(id).ok()).ok_or(ProcessorError::IdOutOfRange { id, vocabulary })
    }
}
