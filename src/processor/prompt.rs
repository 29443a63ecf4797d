//! The language input of one request: a prompt's ids, with pictures as ids beyond the vocabulary.

use serde::{Deserialize, Serialize};

use super::error::ProcessorError;
use super::text::TextProcessor;

/// How a family words a question about pictures that names no placeholder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptTemplate {
    /// The prompt itself, the pictures before it.
    Plain,
    /// `USER: <image>\n{prompt} ASSISTANT:`
    Llava,
    /// The prompt itself (`Question: ... Answer:`, or nothing for a caption); the pictures come before all of it, the
    /// tokenizer's BOS included, and no token stands for them.
    Blip2,
}

impl PromptTemplate {
    /// `prompt` about `pictures` pictures, in the family's words.
    pub fn apply(self, prompt: &str, placeholder: &str, pictures: usize) -> String {
        match self {
            Self::Plain | Self::Blip2 => format!("{}{prompt}", placeholder.repeat(pictures)),
            Self::Llava => {
                let placeholders = format!("{placeholder}\n").repeat(pictures);
                format!("USER: {placeholders}{prompt} ASSISTANT:")
            }
        }
    }
}

/// What a model says about its prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptSettings {
    /// Used where a prompt names no placeholder.
    pub template: PromptTemplate,
    /// The placeholder's id. Without one, and in BLIP-2 always, the features go before the text.
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
        let mut tokens = text.encode(request.prompt, request.add_special_tokens)?;
        let mut input =
            LanguageInput { ids: Vec::with_capacity(tokens.len() + rows.len()), picture_tokens: rows.len() };
        match self.image_token_id {
            Some(placeholder) if self.template != PromptTemplate::Blip2 => {
                if pictures > 0 && !tokens.contains(&placeholder) {
                    let name = text
                        .token(placeholder)
                        .ok_or(ProcessorError::IdOutOfRange { id: placeholder, vocabulary: self.vocabulary })?;
                    let prompt = self.template.apply(request.prompt, &name, pictures);
                    tokens = text.encode(&prompt, request.add_special_tokens)?;
                }
                let found = tokens.iter().filter(|token| **token == placeholder).count();
                if found != pictures {
                    return Err(ProcessorError::Placeholders { found, wanted: pictures });
                }
                let mut rows = rows.chunks(self.features_per_picture.max(1));
                for token in tokens {
                    if token == placeholder {
                        input.ids.extend(rows.next().unwrap_or_default());
                    } else {
                        input.ids.push(self.checked(token)?);
                    }
                }
            }
            placeholder => {
                let found = tokens.iter().filter(|token| Some(**token) == placeholder).count();
                if found > 0 {
                    return Err(ProcessorError::UnwantedPlaceholders { found });
                }
                input.ids.extend(&rows);
                for token in tokens {
                    input.ids.push(self.checked(token)?);
                }
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
