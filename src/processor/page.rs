//! Changes of a page's picture that only Nougat makes, as `NougatImageProcessorPil` of
//! `transformers/models/nougat/image_processing_pil_nougat.py` does them.
use super::error::ProcessorError;
use super::picture::Picture;
use super::resize::{Filter, resize_reducing};

/// Grey below this, of 0 to 255 after stretching, is print and no margin.
const MARGIN: f64 = 200.0;
/// How much larger than the target a thumbnail's picture may still be when the slow filter takes over.
const REDUCING_GAP: f64 = 2.0;

/// Pillow's `convert("L")`.
fn grey(pixel: &[u8]) -> u8 {
    let weighted = std::iter::zip(pixel, [19595u32, 38470, 7471]).map(|(&value, weight)| u32::from(value) * weight);
    ((weighted.sum::<u32>() + 0x8000) >> 16) as u8
}

/// The picture without its bright margins; one of a single grey stays as it is.
pub(super) fn crop_margin(picture: &Picture) -> Picture {
    let greys: Vec<u8> = picture.rgb.chunks_exact(3).map(grey).collect();
    let (darkest, brightest) = greys.iter().fold((255, 0), |(low, high), &grey| (grey.min(low), grey.max(high)));
    if darkest >= brightest {
        return picture.clone();
    }
    let range = f64::from(brightest - darkest);
    let print = |grey: &u8| f64::from(grey - darkest) / range * 255.0 < MARGIN;
    let (mut top, mut bottom, mut left, mut right) = (picture.height, 0, picture.width, 0);
    for (y, row) in greys.chunks_exact(picture.width).enumerate() {
        let (Some(first), Some(last)) = (row.iter().position(print), row.iter().rposition(print)) else { continue };
        (top, bottom) = (top.min(y), y + 1);
        (left, right) = (left.min(first), right.max(last + 1));
    }
    let rows = picture.rgb.chunks_exact(picture.width * 3).take(bottom).skip(top);
    let rgb = rows.flat_map(|row| &row[left * 3..right * 3]).copied().collect();
    Picture { width: right - left, height: bottom - top, rgb }
}

/// The picture turned clockwise where its longer side would lie along the target's shorter one.
pub(super) fn align_long_axis(picture: Picture, height: usize, width: usize) -> Picture {
    let across =
        (width < height && picture.width > picture.height) || (width > height && picture.width < picture.height);
    if !across {
        return picture;
    }
    let pixels: Vec<&[u8]> = picture.rgb.chunks_exact(3).collect();
    let column = |x: usize| pixels.iter().skip(x).step_by(picture.width).rev();
    let rgb = (0..picture.width).flat_map(column).flat_map(|pixel| pixel.iter().copied()).collect();
    Picture { width: picture.height, height: picture.width, rgb }
}

/// The picture made smaller to fit; the longer side decides, the other follows, rounded down.
pub(super) fn thumbnail(picture: &Picture, height: usize, width: usize) -> Result<Picture, ProcessorError> {
    let (mut down, mut across) = (picture.height.min(height), picture.width.min(width));
    if (down, across) == (picture.height, picture.width) {
        return Ok(picture.clone());
    }
    if picture.height > picture.width {
        across = picture.width * down / picture.height;
    } else if picture.width > picture.height {
        down = picture.height * across / picture.width;
    }
    if down == 0 || across == 0 {
        return Err(unfit(picture, "it is too narrow: a side of its thumbnail would have no pixel"));
    }
    Ok(resize_reducing(picture, across, down, Filter::Bicubic, REDUCING_GAP))
}

/// The picture in the middle of black; an odd difference leaves the smaller part before it.
pub(super) fn frame(picture: &Picture, height: usize, width: usize) -> Result<Picture, ProcessorError> {
    if picture.height > height || picture.width > width {
        return Err(unfit(
            picture,
            &format!("it does not fit into `{width}` x `{height}`, which it is to be padded to"),
        ));
    }
    let (top, left) = ((height - picture.height) / 2, (width - picture.width) / 2);
    let mut rgb = vec![0; height * width * 3];
    for (y, row) in picture.rgb.chunks_exact(picture.width * 3).enumerate() {
        let start = ((top + y) * width + left) * 3;
        rgb[start..start + row.len()].copy_from_slice(row);
    }
    Ok(Picture { width, height, rgb })
}

fn unfit(picture: &Picture, reason: &str) -> ProcessorError {
    ProcessorError::picture(format!("{} x {} pixels", picture.width, picture.height), reason)
}
