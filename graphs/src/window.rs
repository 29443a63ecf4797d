//! Bias of attention inside of windows (Swin, Liu et al. 2021, arXiv 2103.14030): a number for each head and offset between
//! two places of a window, and a wall between places that only a roll of the picture brought together.
//! Rows and walls as in `transformers/models/donut/modeling_donut_swin.py`.
use crate::Weight;
use serde::{Deserialize, Serialize};

/// The windows of a picture are heads of their own: head `window * heads + head`, windows row by row.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WindowBias {
    /// `[(2 * side - 1)^2, heads]`, heads of one window.
    pub weight: Weight,
    /// Places along one side of a window.
    pub side: usize,
    /// Windows down and across.
    pub grid: [usize; 2],
    /// Places by which the picture was rolled, up and to the left.
    pub shift: usize,
}

impl WindowBias {
    /// What is added to the score of places that were no neighbours before the roll; not infinity.
    const WALL: f32 = -100.0;

    pub fn windows(&self) -> usize {
        self.grid[0] * self.grid[1]
    }

    /// Whether any window holds places that were no neighbours before the roll.
    pub fn has_walls(&self) -> bool {
        self.shift > 0
    }

    /// Places of one window.
    pub fn places(&self) -> usize {
        self.side * self.side
    }

    /// Whether the weight has a row for each offset of two places, for so many heads in all windows.
    pub(crate) fn is_sound(&self, heads: usize) -> bool {
        let offsets = self.side.saturating_mul(2).saturating_sub(1);
        let [rows, each] = self.weight.shape()[..] else { return false };
        let windows = self.grid[0].checked_mul(self.grid[1]);
        self.shift < self.side
            && offsets.checked_mul(offsets) == Some(rows)
            && heads > 0
            && windows.and_then(|windows| windows.checked_mul(each)) == Some(heads)
    }

    /// Row of the weight for two places of a window.
    pub fn row(&self, query: usize, key: usize) -> usize {
        let side = self.side;
        let offset = |query: usize, key: usize| query + side - 1 - key;
        offset(query / side, key / side) * (2 * side - 1) + offset(query % side, key % side)
    }

    /// What a window adds to the score of two of its places, whatever the head.
    pub fn wall(&self, window: usize, query: usize, key: usize) -> f32 {
        if self.region(window, query) == self.region(window, key) { 0.0 } else { Self::WALL }
    }

    /// Which part of the picture a place of the rolled picture comes from, down and across: only the last windows hold
    /// more than one.
    fn region(&self, window: usize, place: usize) -> [bool; 2] {
        let [rows, columns] = self.grid;
        let beyond = |window: usize, windows: usize, place: usize| {
            self.shift > 0 && window + 1 == windows && place >= self.side - self.shift
        };
        [beyond(window / columns, rows, place / self.side), beyond(window % columns, columns, place % self.side)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The nine regions of the rolled picture by their borders, as the paper draws them.
    #[test]
    fn walls_stand_where_regions_meet() {
        for (side, grid, shift) in [(4usize, [3, 3], 2), (3, [1, 2], 1), (2, [2, 1], 0)] {
            let bias = WindowBias { weight: Weight::tensor("b", &[(2 * side - 1).pow(2), 2]), side, grid, shift };
            assert!(bias.is_sound(2 * grid[0] * grid[1]) && !bias.is_sound(2));
            let region = |place: usize, count: usize| {
                usize::from(place + side >= count * side) + usize::from(place + shift >= count * side)
            };
            for window in 0..bias.windows() {
                for (query, key) in (0..bias.places()).flat_map(|query| (0..bias.places()).map(move |key| (query, key)))
                {
                    let at = |place: usize| {
                        let (row, column) =
                            (window / grid[1] * side + place / side, window % grid[1] * side + place % side);
                        if shift == 0 { [0, 0] } else { [region(row, grid[0]), region(column, grid[1])] }
                    };
                    let wanted = if at(query) == at(key) { 0.0 } else { -100.0 };
                    assert_eq!(bias.wall(window, query, key), wanted, "{side} {grid:?}: {window} {query} {key}");
                }
            }
        }
    }
}
