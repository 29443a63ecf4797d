//! Decoding a picture file into plain RGB.
//!
//! The rules are those of HF's `load_image`: the EXIF turn is applied, then Pillow's `convert("RGB")`: alpha is
//! dropped (not blended), grey is repeated, palettes are looked up. A 16-bit sample becomes its high byte.

use std::io::Cursor;
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageFormat, ImageReader, Limits};

use super::error::ProcessorError;

/// Longest side accepted, in pixels.
pub const MAXIMUM_SIDE: u32 = 8192;
/// Largest area accepted, in pixels.
pub const MAXIMUM_PIXELS: u64 = 64 << 20;
/// Largest ratio of the longer to the shorter side: beyond it the resized picture would be almost all outside the crop.
pub const MAXIMUM_ASPECT_RATIO: u32 = 200;
const MAXIMUM_BYTES: u64 = 512 << 20;

/// A decoded picture: `height` rows of `width` pixels of three bytes, red first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Picture {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `height * width * 3` bytes.
    pub rgb: Vec<u8>,
}

impl Picture {
    /// A picture from raw pixels.
    ///
    /// # Errors
    /// The sides and the number of bytes do not agree, or the sides are refused (see [`Picture::decode`]).
    pub fn from_rgb(width: usize, height: usize, rgb: Vec<u8>) -> Result<Self, ProcessorError> {
        let wanted = width.checked_mul(height).and_then(|pixels| pixels.checked_mul(3));
        if wanted != Some(rgb.len()) {
            return Err(ProcessorError::picture(
                "raw pixels",
                format!("found {} bytes, wanted `{width}` x `{height}` x 3", rgb.len()),
            ));
        }
        let side = |side: usize| u32::try_from(side).unwrap_or(u32::MAX);
        check_sides("raw pixels", side(width), side(height))?;
        Ok(Self { width, height, rgb })
    }

    /// Reads and decodes the PNG or JPEG file at `path`.
    ///
    /// # Errors
    /// The file cannot be read, or what [`Picture::decode`] refuses.
    pub fn open(path: &Path) -> Result<Self, ProcessorError> {
        let bytes = std::fs::read(path).map_err(|source| ProcessorError::Read { path: path.to_owned(), source })?;
        Self::decode(&bytes, &path.display().to_string())
    }

    /// Decodes a PNG or JPEG; `name` stands for it in errors.
    ///
    /// # Errors
    /// Not a PNG or JPEG, damaged, a side over 8192 pixels, more than 64 Mpx, over 512 MiB while decoding, or sides
    /// further apart than 200 to 1. Sides are judged by the header, before any pixel is decoded.
    pub fn decode(bytes: &[u8], name: &str) -> Result<Self, ProcessorError> {
        let format = match image::guess_format(bytes) {
            Ok(format @ (ImageFormat::Png | ImageFormat::Jpeg)) => format,
            Ok(other) => return Err(ProcessorError::picture(name, format!("found {other:?}, wanted PNG or JPEG"))),
            Err(_) => return Err(ProcessorError::picture(name, "this is not a PNG or JPEG file")),
        };
        // The decoder's own words may quote the file's bytes: the reason is ours.
        let damaged = |error: image::ImageError| {
            let reason = match error {
                image::ImageError::Limits(_) => "decoding it would take more than 512 MiB",
                image::ImageError::Unsupported(_) => "it uses a feature of the format that is not supported",
                _ => "the file is damaged or cut short",
            };
            ProcessorError::picture(name, reason)
        };
        let mut reader = ImageReader::with_format(Cursor::new(bytes), format);
        let mut limits = Limits::default();
        limits.max_alloc = Some(MAXIMUM_BYTES);
        reader.limits(limits);
        // The PNG decoder would refuse huge sides itself, as too many bytes.
        if let Some((width, height)) = png_sides(bytes) {
            check_sides(name, width, height)?;
        }
        let mut decoder = reader.into_decoder().map_err(damaged)?;
        let (width, height) = decoder.dimensions();
        check_sides(name, width, height)?;
        if decoder.total_bytes() > MAXIMUM_BYTES {
            return Err(ProcessorError::picture(name, "decoding it would take more than 512 MiB"));
        }
        let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
        let decoded = DynamicImage::from_decoder(decoder).map_err(damaged)?;
        let rgb = convert_to_rgb(&decoded);
        drop(decoded);
        let upright = turn(rgb, width, height, orientation)
            .ok_or_else(|| ProcessorError::picture(name, "the decoder gave a wrong number of pixels"))?;
        Ok(upright)
    }
}

/// Width and height in the header chunk of a PNG.
fn png_sides(bytes: &[u8]) -> Option<(u32, u32)> {
    let sides = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n")?.get(4..)?.strip_prefix(b"IHDR")?;
    let (width, rest) = sides.split_first_chunk()?;
    Some((u32::from_be_bytes(*width), u32::from_be_bytes(*rest.first_chunk()?)))
}

fn check_sides(name: &str, width: u32, height: u32) -> Result<(), ProcessorError> {
    let (short, long) = (width.min(height), width.max(height));
    let reason = if short == 0 {
        "has no pixels".to_owned()
    } else if long > MAXIMUM_SIDE {
        format!("its longer side may be `{MAXIMUM_SIDE}` pixels at most")
    } else if u64::from(width) * u64::from(height) > MAXIMUM_PIXELS {
        format!("it may have `{MAXIMUM_PIXELS}` pixels at most")
    } else if long / short > MAXIMUM_ASPECT_RATIO
        || (long / short == MAXIMUM_ASPECT_RATIO && !long.is_multiple_of(short))
    {
        format!("its longer side may be `{MAXIMUM_ASPECT_RATIO}` times the shorter one at most")
    } else {
        return Ok(());
    };
    Err(ProcessorError::picture(name, format!("found `{width}` x `{height}` pixels: {reason}")))
}

/// Pillow's `convert("RGB")`.
fn convert_to_rgb(image: &DynamicImage) -> Vec<u8> {
    fn high(sample: &u16) -> u8 {
        (sample >> 8) as u8
    }
    fn repeat(grey: u8) -> [u8; 3] {
        [grey; 3]
    }
    match image {
        DynamicImage::ImageLuma8(grey) => grey.as_raw().iter().copied().flat_map(repeat).collect(),
        DynamicImage::ImageLumaA8(grey) => grey.pixels().flat_map(|pixel| repeat(pixel.0[0])).collect(),
        DynamicImage::ImageRgba8(rgba) => {
            let pixels = rgba.pixels().flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2]]);
            pixels.collect()
        }
        DynamicImage::ImageLuma16(grey) => grey.as_raw().iter().map(high).flat_map(repeat).collect(),
        DynamicImage::ImageLumaA16(grey) => grey.pixels().flat_map(|pixel| repeat(high(&pixel.0[0]))).collect(),
        DynamicImage::ImageRgb16(rgb) => rgb.as_raw().iter().map(high).collect(),
        DynamicImage::ImageRgba16(rgba) => {
            let pixels = rgba.pixels().flat_map(|pixel| [pixel.0[0], pixel.0[1], pixel.0[2]]);
            pixels.map(|sample| high(&sample)).collect()
        }
        other => other.to_rgb8().into_raw(),
    }
}

fn turn(rgb: Vec<u8>, width: u32, height: u32, orientation: Orientation) -> Option<Picture> {
    let mut image = DynamicImage::ImageRgb8(image::RgbImage::from_raw(width, height, rgb)?);
    image.apply_orientation(orientation);
    Some(Picture {
        width: usize::try_from(image.width()).ok()?,
        height: usize::try_from(image.height()).ok()?,
        rgb: image.into_rgb8().into_raw(),
    })
}
