//! Resampling equal to Pillow's in every byte.
//!
//! Checkpoints were trained behind Pillow, and no crate agrees with it to the byte (a bicubic photo differs by up to
//! 25 levels). Its recipe: per output pixel a window of weights in 22-bit fixed point, rows and columns in two passes,
//! and the first pass's result rounded to u8 before the second sees it. Which pass is first is Pillow 13's choice.

use serde::{Deserialize, Serialize};

use super::picture::Picture;

/// Fraction bits of a weight: 32 less 8 for the pixel and 2 for sums beyond 1.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// A resampling filter of Pillow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// The pixel under the centre.
    Nearest,
    /// Mean of the covered area.
    Box,
    /// Triangle.
    Bilinear,
    /// Hamming-windowed sinc over one pixel.
    Hamming,
    /// Catmull-Rom (a = -0.5).
    Bicubic,
    /// Sinc windowed by sinc over three pixels.
    Lanczos,
}

impl Filter {
    /// The filter behind a number of Pillow's `Resampling`, which is what configuration files hold.
    pub fn from_number(number: u64) -> Option<Self> {
        match number {
            0 => Some(Self::Nearest),
            1 => Some(Self::Lanczos),
            2 => Some(Self::Bilinear),
            3 => Some(Self::Bicubic),
            4 => Some(Self::Box),
            5 => Some(Self::Hamming),
            _ => None,
        }
    }

    fn support(self) -> f64 {
        match self {
            Self::Nearest | Self::Box => 0.5,
            Self::Bilinear | Self::Hamming => 1.0,
            Self::Bicubic => 2.0,
            Self::Lanczos => 3.0,
        }
    }

    fn weight(self, x: f64) -> f64 {
        match self {
            Self::Nearest | Self::Box => f64::from(x > -0.5 && x <= 0.5),
            Self::Bilinear => (1.0 - x.abs()).max(0.0),
            Self::Hamming => match x.abs() {
                0.0 => 1.0,
                x if x >= 1.0 => 0.0,
                x => {
                    let angle = x * std::f64::consts::PI;
                    angle.sin() / angle * (0.54 + 0.46 * angle.cos())
                }
            },
            Self::Bicubic => {
                const A: f64 = -0.5;
                match x.abs() {
                    x if x < 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
                    x if x < 2.0 => (((x - 5.0) * x + 8.0) * x - 4.0) * A,
                    _ => 0.0,
                }
            }
            Self::Lanczos if (-3.0..3.0).contains(&x) => sinc(x) * sinc(x / 3.0),
            Self::Lanczos => 0.0,
        }
    }
}

fn sinc(x: f64) -> f64 {
    if x == 0.0 {
        return 1.0;
    }
    let angle = x * std::f64::consts::PI;
    angle.sin() / angle
}

/// The input pixels that one output pixel reads, and how much of each.
struct Window {
    first: usize,
    weights: Vec<i32>,
}

/// One window per output pixel of a side, of which the first `extent` of the input's pixels count.
fn windows(input: usize, extent: f32, output: usize, filter: Filter) -> Vec<Window> {
    let scale = f64::from(extent) / output as f64;
    let stretch = scale.max(1.0);
    let support = filter.support() * stretch;
    let shrink = 1.0 / stretch;
    (0..output)
        .map(|index| {
            let center = (index as f64 + 0.5) * scale;
            // `as` truncates towards zero and saturates at 0, as the C cast and clamp do.
            let first = (center - support + 0.5) as usize;
            let end = ((center + support + 0.5) as usize).min(input);
            let exact: Vec<f64> =
                (first..end).map(|position| filter.weight((position as f64 - center + 0.5) * shrink)).collect();
            let sum: f64 = exact.iter().sum();
            let fixed = |weight: &f64| {
                let weight = if sum == 0.0 { *weight } else { weight / sum };
                let scaled = weight * f64::from(1u32 << PRECISION_BITS);
                (if weight < 0.0 { scaled - 0.5 } else { scaled + 0.5 }) as i32
            };
            Window { first, weights: exact.iter().map(fixed).collect() }
        })
        .collect()
}

const HALF: i32 = 1 << (PRECISION_BITS - 1);

fn clip(sum: i32) -> u8 {
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

/// Resamples each row to `output` pixels.
fn resample_rows(picture: &Picture, extent: f32, output: usize, filter: Filter) -> Picture {
    let windows = windows(picture.width, extent, output, filter);
    let mut rgb = Vec::with_capacity(output * picture.height * 3);
    for row in picture.rgb.chunks_exact(picture.width * 3) {
        for window in &windows {
            let mut sums = [HALF; 3];
            let pixels = row[window.first * 3..].chunks_exact(3);
            for (pixel, weight) in pixels.zip(&window.weights) {
                for (sum, value) in sums.iter_mut().zip(pixel) {
                    *sum = sum.wrapping_add(i32::from(*value) * weight);
                }
            }
            rgb.extend(sums.map(clip));
        }
    }
    Picture { width: output, height: picture.height, rgb }
}

/// Resamples each column to `output` pixels, a whole row of sums at a time.
fn resample_columns(picture: &Picture, extent: f32, output: usize, filter: Filter) -> Picture {
    let stride = picture.width * 3;
    let mut rgb = Vec::with_capacity(stride * output);
    let mut sums = vec![HALF; stride];
    for window in windows(picture.height, extent, output, filter) {
        sums.fill(HALF);
        let rows = picture.rgb.chunks_exact(stride).skip(window.first);
        for (row, weight) in rows.zip(&window.weights) {
            for (sum, value) in sums.iter_mut().zip(row) {
                *sum = sum.wrapping_add(i32::from(*value) * weight);
            }
        }
        rgb.extend(sums.iter().map(|sum| clip(*sum)));
    }
    Picture { width: picture.width, height: output, rgb }
}

/// Where each output pixel of a side reads, for the nearest filter. Pillow adds the step up, it does not multiply.
fn nearest_positions(input: usize, output: usize) -> Vec<usize> {
    let step = input as f64 / output as f64;
    let mut position = step * 0.5;
    (0..output)
        .map(|_| {
            let here = (position as usize).min(input.saturating_sub(1));
            position += step;
            here
        })
        .collect()
}

fn nearest(picture: &Picture, width: usize, height: usize) -> Picture {
    let columns = nearest_positions(picture.width, width);
    let mut rgb = Vec::with_capacity(width * height * 3);
    for row in nearest_positions(picture.height, height) {
        for column in &columns {
            let at = (row * picture.width + column) * 3;
            rgb.extend_from_slice(&picture.rgb[at..at + 3]);
        }
    }
    Picture { width, height, rgb }
}

/// `picture` at `width` x `height` pixels, each byte as Pillow's `Image.resize` gives it. Neither side may be 0.
pub fn resize(picture: &Picture, width: usize, height: usize, filter: Filter) -> Picture {
    if (picture.width, picture.height) == (width, height) {
        return picture.clone();
    }
    if filter == Filter::Nearest {
        return nearest(picture, width, height);
    }
    resample(picture, width, height, filter, [picture.width as f32, picture.height as f32])
}

/// As [`resize`], but where the picture is more than `gap` times too large, boxes of pixels are averaged first, as
/// Pillow does it with its `reducing_gap`.
pub(super) fn resize_reducing(picture: &Picture, width: usize, height: usize, filter: Filter, gap: f64) -> Picture {
    let factor = |from: usize, to: usize| ((from as f64 / to as f64 / gap) as usize).max(1);
    let (across, down) = (factor(picture.width, width), factor(picture.height, height));
    if filter == Filter::Nearest || (across, down) == (1, 1) {
        return resize(picture, width, height, filter);
    }
    // The last box may reach beyond the picture: only a part of what it became counts.
    let extent = |side: usize, factor: usize| (side as f64 / factor as f64) as f32;
    let extents = [extent(picture.width, across), extent(picture.height, down)];
    resample(&reduce(picture, across, down), width, height, filter, extents)
}

/// Pillow's `Image.reduce`: the mean of each box, in its 24-bit fixed point; boxes at the end may be smaller.
fn reduce(picture: &Picture, across: usize, down: usize) -> Picture {
    let (width, height) = (picture.width.div_ceil(across), picture.height.div_ceil(down));
    let mut rgb = Vec::with_capacity(width * height * 3);
    for (y, x) in (0..height).flat_map(|y| (0..width).map(move |x| (y * down, x * across))) {
        let (rows, columns) = (down.min(picture.height - y), across.min(picture.width - x));
        let count = (rows * columns) as u32;
        let mut sums = [count / 2; 3];
        for row in y..y + rows {
            let start = (row * picture.width + x) * 3;
            for pixel in picture.rgb[start..start + columns * 3].chunks_exact(3) {
                std::iter::zip(&mut sums, pixel).for_each(|(sum, value)| *sum = sum.wrapping_add(u32::from(*value)));
            }
        }
        // A quotient of f32, which is what C makes of it.
        let multiplier = ((1u64 << 32) as f32 / count.wrapping_shl(8) as f32) as u32;
        rgb.extend(sums.map(|sum| (sum.wrapping_mul(multiplier) >> 24) as u8));
    }
    Picture { width, height, rgb }
}

/// The first `extents` pixels (columns, rows) of the picture at another size.
fn resample(picture: &Picture, width: usize, height: usize, filter: Filter, extents: [f32; 2]) -> Picture {
    let by_rows = |picture: &Picture| resample_rows(picture, extents[0], width, filter);
    let by_columns = |picture: &Picture| resample_columns(picture, extents[1], height, filter);
    let whole = |side: usize, wanted: usize, extent: f32| side == wanted && extent == wanted as f32;
    match (whole(picture.width, width, extents[0]), whole(picture.height, height, extents[1])) {
        (true, true) => picture.clone(),
        (true, _) => by_columns(picture),
        (false, true) => by_rows(picture),
        (false, false) if columns_first(picture, width, height) => by_rows(&by_columns(picture)),
        (false, false) => by_columns(&by_rows(picture)),
    }
}

/// Pillow 13 takes the columns first where the height loses more than twice the pixels that the width loses. Up to
/// Pillow 12 the rows were always first: pictures of this kind differ between the two by a level or so.
fn columns_first(picture: &Picture, width: usize, height: usize) -> bool {
    let lost = |from: usize, to: usize| from as i64 - to as i64;
    let (rows, columns) = (lost(picture.height, height), lost(picture.width, width));
    rows > 0 && rows > 2 * columns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_stay_inside_and_sum_to_one() {
        for filter in [Filter::Box, Filter::Bilinear, Filter::Bicubic, Filter::Lanczos, Filter::Hamming] {
            for (input, output) in [(1, 7), (7, 1), (53, 28), (28, 53), (640, 3)] {
                let windows = windows(input, input as f32, output, filter);
                assert_eq!(windows.len(), output);
                for window in windows {
                    assert!(window.first + window.weights.len() <= input);
                    let sum: i64 = window.weights.iter().map(|weight| i64::from(*weight)).sum();
                    let error = (sum - (1 << PRECISION_BITS)).unsigned_abs() as usize;
                    assert!(error <= window.weights.len(), "{filter:?} {input} {output}: {error}");
                }
            }
        }
    }

    #[test]
    fn a_flat_picture_stays_flat() {
        let picture = Picture { width: 5, height: 3, rgb: [7, 130, 255].repeat(15) };
        for number in 0..6 {
            let filter = Filter::from_number(number).expect("six filters");
            let resized = resize(&picture, 17, 2, filter);
            assert_eq!(resized.rgb, [7, 130, 255].repeat(34), "{filter:?}");
        }
    }
}
