//! Text as it comes, id by id.

use super::error::ProcessorError;
use super::text::TextProcessor;

/// Decodes ids one by one and gives out text that later ids will not change.
///
/// A token's text depends on its neighbours (a leading space, bytes of one character), so a short window of ids is
/// decoded again with each new one. The pieces joined are the text of the whole, except where the model writes bytes
/// that are no UTF-8: a whole decode then replaces the complete characters beside them too.
#[derive(Debug)]
pub struct TextStream<'a> {
    text: &'a TextProcessor,
    /// Ids since the window began.
    window: Vec<u32>,
    /// How many of these have been given out.
    given: usize,
}

impl<'a> TextStream<'a> {
    pub(super) fn new(text: &'a TextProcessor) -> Self {
        Self { text, window: Vec::new(), given: 0 }
    }

    /// Takes the next id; returns the text that is now certain, often one token's, sometimes none.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<String, ProcessorError> {
        self.window.push(id);
        self.advance(false)
    }

    /// Ends the stream; returns the text that was held back.
    ///
    /// # Errors
    /// The tokenizer's decoder fails.
    pub fn finish(&mut self) -> Result<String, ProcessorError> {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> Result<String, ProcessorError> {
        let whole = self.text.decode(&self.window)?;
        // The mark that the decoder puts for bytes of a character not yet complete.
        if !last && whole.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        let (before, after) = self.window.split_at(self.given);
        let new = match whole.strip_prefix(&self.text.decode(before)?) {
            Some(new) => new.to_owned(),
            // Bytes that are no UTF-8 have spoilt what was given out: only the rest is left to give.
            None => self.text.decode(after)?,
        };
        if !new.is_empty() {
            self.window.drain(..self.given);
            self.given = self.window.len();
        }
        Ok(new)
    }
}
