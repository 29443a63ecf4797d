//! What calibration keeps of the inputs of linear layers. Samples may come in any number of parts: the result is the same.
use std::collections::BTreeMap;

/// How much more often favored rows are kept.
const FAVOR: u64 = 8;

/// Of one distinct input.
#[derive(Clone, Debug, PartialEq)]
pub struct InputStatistics {
    /// Largest magnitude of each channel.
    pub absmax: Vec<f32>,
    /// Mean magnitude of each channel.
    pub mean: Vec<f32>,
    /// Some of the inputs themselves, `[.., width]`.
    pub rows: Vec<f32>,
}

/// The same while it grows.
#[derive(Clone, Debug, PartialEq)]
pub struct Gathered {
    pub absmax: Vec<f32>,
    /// Sum of magnitudes of each channel.
    pub sum: Vec<f64>,
    pub count: u64,
    /// The rows with the least lots, by lot.
    pub rows: BTreeMap<u64, Vec<f32>>,
}

impl Gathered {
    pub fn new(width: usize) -> Gathered {
        Gathered { absmax: vec![0.0; width], sum: vec![0.0; width], count: 0, rows: BTreeMap::new() }
    }

    pub fn width(&self) -> usize {
        self.absmax.len()
    }

    /// Adds the rows of sample `sample` and keeps at most `limit` of all. Which are kept depends on the numbers of samples
    /// and rows alone, so all inputs of a network keep the same tokens; rows from `favored` on are kept so much more often
    /// that few others stay.
    pub fn add(&mut self, values: &[f32], sample: u64, limit: usize, favored: usize) {
        for (number, row) in values.chunks_exact(self.width().max(1)).enumerate() {
            for (channel, value) in row.iter().enumerate() {
                let magnitude = value.abs();
                self.absmax[channel] = self.absmax[channel].max(magnitude);
                self.sum[channel] += f64::from(magnitude);
            }
            self.count += 1;
            let lot = lot(sample, number as u64) / if number >= favored { FAVOR } else { 1 };
            let full = self.rows.len() >= limit;
            if !full || self.rows.last_key_value().is_some_and(|(last, _)| lot < *last) {
                self.rows.insert(lot, row.to_vec());
            }
            while self.rows.len() > limit {
                self.rows.pop_last();
            }
        }
    }

    pub fn finish(&self) -> InputStatistics {
        let count = self.count.max(1) as f64;
        InputStatistics {
            absmax: self.absmax.clone(),
            mean: self.sum.iter().map(|sum| (sum / count) as f32).collect(),
            rows: self.rows.values().flatten().copied().collect(),
        }
    }
}

/// A number that looks random, of a row: SplitMix64 (Steele, Lea and Flood 2014).
fn lot(sample: u64, row: u64) -> u64 {
    let state = (sample << 32 | row).wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let state = (state ^ (state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let state = (state ^ (state >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    state ^ (state >> 31)
}
