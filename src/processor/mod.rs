//! What happens before and after the networks at run time: pictures to pixels, prompts to ids, ids to text.

mod error;
mod image;
mod picture;
mod resize;

pub use self::error::ProcessorError;
pub use self::image::{ImageProcessor, Normalization, ResizeTo, Step};
pub use self::picture::{MAXIMUM_ASPECT_RATIO, MAXIMUM_PIXELS, MAXIMUM_SIDE, Picture};
pub use self::resize::{Filter, resize};
