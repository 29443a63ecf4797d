//! Keys and values of one token and head as INT8 with a scale of their own: symmetric, found when the row is kept, so that
//! nothing has to be known of a model beforehand.
//!
//! The scale is the row's largest magnitude / 127 in float32, values are x / scale rounded half to even. A row lies in
//! memory as its INT8 values, zeros up to a multiple of 4, and the scale's 4 bytes: every part of it can be read at once.

/// Bytes of the scale, which every row begins and ends on a multiple of.
const SCALE: usize = size_of::<f32>();

/// Bytes of a row of `head_dim` values in memory.
pub const fn stored_bytes(head_dim: usize) -> usize {
    head_dim.next_multiple_of(SCALE) + SCALE
}

/// The scale of a row: NaN if one of its values is, 0 if they are too small for one.
pub fn scale(row: &[f32]) -> f32 {
    let larger = |most: f32, x: &f32| if x.abs() > most || x.is_nan() { x.abs() } else { most };
    row.iter().fold(0.0, larger) / 127.0
}

/// One value in steps of `scale`; 0 where the scale is none.
pub fn steps(x: f32, scale: f32) -> i8 {
    if scale > 0.0 { (x / scale).round_ties_even().clamp(-127.0, 127.0) as i8 } else { 0 }
}

/// What is read back of a row that was kept.
pub fn round(row: &mut [f32]) {
    let scale = scale(row);
    row.iter_mut().for_each(|x| *x = f32::from(steps(*x, scale)) * scale);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers of many magnitudes, from a little generator.
    fn rows() -> impl Iterator<Item = Vec<f32>> {
        let mut state = 1u64;
        let mut next = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        (1..=256).map(move |size| {
            let magnitude = (next() * 60.0).exp2();
            (0..size).map(|_| next() * magnitude).collect()
        })
    }

    /// The nearest multiple by looking at all of them, in float64: of two that are as near the even one.
    fn nearest(x: f32, scale: f32) -> i8 {
        let away = |step: i16| (f64::from(x / scale) - f64::from(step)).abs();
        let order = |a: &i16, b: &i16| away(*a).total_cmp(&away(*b)).then((a & 1).cmp(&(b & 1)));
        (-127..=127i16).min_by(order).map_or(0, |step| step as i8)
    }

    #[test]
    fn every_value_is_the_nearest_step() {
        for row in rows() {
            let scale = scale(&row);
            let mut kept = row.clone();
            round(&mut kept);
            for (&x, &back) in std::iter::zip(&row, &kept) {
                assert_eq!(steps(x, scale), nearest(x, scale), "{x} in steps of {scale}");
                assert!((x - back).abs() <= scale * 0.500001, "{x} came back as {back} in steps of {scale}");
            }
            let most = |row: &[f32]| row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
            assert!((most(&row) - most(&kept)).abs() <= most(&row) * 2e-7, "the largest stays");
        }
        assert_eq!([0.5, 1.5, 2.5, -0.5, -2.5].map(|x| steps(x, 1.0)), [0, 2, 2, 0, -2]);
    }

    #[test]
    fn a_row_that_is_no_row_of_numbers_stays_none() {
        let back = |row: &[f32]| {
            let mut row = row.to_vec();
            round(&mut row);
            row
        };
        assert_eq!(back(&[0.0, -0.0]), [0.0, 0.0]);
        assert_eq!(back(&[]), [0.0f32; 0]);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(back(&[3.0, bad, 1.0]).iter().all(|x| x.is_nan()));
            assert!(back(&[bad, 3.0]).iter().all(|x| x.is_nan()));
        }
        // The scale is a fraction of the smallest number, or nearly.
        assert_eq!(back(&[1e-45, 0.0]), [0.0, 0.0]);
        assert!(back(&[2e-43, -2e-43]).iter().all(|x| x.is_finite()));
    }

    #[test]
    fn rows_lie_so_that_words_can_be_read() {
        for head_dim in 1..=256 {
            let bytes = stored_bytes(head_dim);
            assert!(bytes.is_multiple_of(4) && bytes >= head_dim + 4 && bytes < head_dim + 8, "{head_dim}");
        }
        assert_eq!([6, 64, 80, 128, 256].map(stored_bytes), [12, 68, 84, 132, 260]);
    }
}
