//! What calibration keeps of the inputs of linear layers. Samples may come in any number of parts: the result is the same.
use rayon::prelude::*;
use std::collections::BTreeMap;

/// Channels that one thread sums in one go.
const CHANNELS: usize = 256;

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

/// Rows of one sample.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    /// Its number among all samples.
    pub sample: u64,
    pub rows: usize,
    /// Rows from this on are favored.
    pub favored: usize,
}

/// A row that is kept: the least lots are. `share` is its sample's place among those chosen from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Kept {
    pub lot: u64,
    pub share: usize,
    pub row: usize,
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

    /// Adds the rows of a sample and keeps at most `limit` of all. Which are kept depends on the numbers of samples and rows
    /// alone, so all inputs of a network keep the same tokens; favored rows are kept so much more often that few others stay.
    pub fn add(&mut self, values: &[f32], share: Share, limit: usize) {
        let width = self.width().max(1);
        let kept = self.choose(&[share], limit);
        self.keep(kept.iter().map(|kept| (kept.lot, values[kept.row * width..(kept.row + 1) * width].to_vec())), limit);
        self.count += share.rows as u64;
        // Each channel is summed in the order of its rows, whichever thread does it.
        let (absmax, sum) = (self.absmax.par_chunks_mut(CHANNELS), self.sum.par_chunks_mut(CHANNELS));
        absmax.zip(sum).enumerate().for_each(|(part, (absmax, sum))| {
            for row in values.chunks_exact(width) {
                let row = &row[part * CHANNELS..part * CHANNELS + absmax.len()];
                for ((absmax, sum), value) in std::iter::zip(&mut *absmax, &mut *sum).zip(row) {
                    let magnitude = value.abs();
                    *absmax = absmax.max(magnitude);
                    *sum += f64::from(magnitude);
                }
            }
        });
    }

    /// Adds what was gathered elsewhere of `count` rows: largest magnitudes and sums of magnitudes by channel, and those rows
    /// that [`Gathered::choose`] named.
    pub fn join(
        &mut self,
        count: u64,
        absmax: &[f32],
        sum: &[f64],
        rows: impl Iterator<Item = (u64, Vec<f32>)>,
        limit: usize,
    ) {
        self.count += count;
        std::iter::zip(&mut self.absmax, absmax).for_each(|(most, other)| *most = most.max(*other));
        std::iter::zip(&mut self.sum, sum).for_each(|(sum, other)| *sum += other);
        self.keep(rows, limit);
    }

    /// Which rows of some samples will be among the `limit` that are kept, by lot.
    pub fn choose(&self, shares: &[Share], limit: usize) -> Vec<Kept> {
        let full = self.rows.len() >= limit;
        let bound = self.rows.last_key_value().filter(|_| full).map_or(u64::MAX, |(last, _)| *last);
        let lots = shares.iter().enumerate().flat_map(|(share, of)| {
            (0..of.rows).map(move |row| {
                let lot = lot(of.sample, row as u64) / if row >= of.favored { FAVOR } else { 1 };
                Kept { lot, share, row }
            })
        });
        let mut kept: Vec<Kept> = lots.filter(|kept| kept.lot < bound || !full).collect();
        kept.sort_unstable();
        kept.truncate(limit);
        kept
    }

    fn keep(&mut self, rows: impl Iterator<Item = (u64, Vec<f32>)>, limit: usize) {
        self.rows.extend(rows);
        while self.rows.len() > limit {
            self.rows.pop_last();
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
