//! What happens before and after the networks at run time: pictures to pixels, prompts to ids, ids to text.
//!
//! All of it is driven by the files of the processor folder, which are the checkpoint's own, copied into the engine
//! directory at build time.

mod chat;
mod error;
mod folder;
mod generation;
mod image;
mod page;
mod picture;
mod prompt;
mod resize;
mod sentencepiece;
mod stream;
mod text;
mod unigram;

pub use self::chat::{ChatMessage, ChatTemplate};
pub use self::error::ProcessorError;
pub use self::folder::{FILES, Processor};
pub use self::generation::{Generation, TokenRules};
pub use self::image::{ImageProcessor, Normalization, ResizeTo, Step};
pub use self::picture::{MAXIMUM_ASPECT_RATIO, MAXIMUM_PIXELS, MAXIMUM_SIDE, Picture};
pub use self::prompt::{LanguageInput, PLACEHOLDER, PromptRequest, PromptSettings, PromptTemplate};
pub use self::resize::{Filter, resize};
pub use self::stream::TextStream;
pub use self::text::TextProcessor;
