//! How far a quantized layer is from the one that it was made of, on slices: what reports and size budgets count.
use graphs::interpret::multiply;
use std::iter::Sum;

/// Sums of squares: of differences, and of what should have come out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Deviation {
    pub off: f64,
    pub whole: f64,
}

impl Deviation {
    /// Of weights from weights.
    pub fn of_weights(wanted: &[f32], found: &[f32]) -> Deviation {
        let pairs = std::iter::zip(wanted, found);
        let off = pairs.map(|(wanted, found)| f64::from(wanted - found).powi(2)).sum();
        Deviation { off, whole: wanted.iter().map(|wanted| f64::from(*wanted).powi(2)).sum() }
    }

    /// Of products X' W'^T from X W^T: inputs `[.., width]`, matrices `[out, width]`.
    pub fn of_products(wanted: (&[f32], &[f32]), found: (&[f32], &[f32]), width: usize) -> Deviation {
        let product = |(inputs, weights): (&[f32], &[f32])| {
            let sizes = [inputs.len() / width.max(1), width, weights.len() / width.max(1)];
            multiply(inputs, weights, sizes, true, false)
        };
        Deviation::of_weights(&product(wanted), &product(found))
    }

    /// Norm of the differences over that of the whole: 0 where nothing is off, infinite where all of it is and nothing
    /// should be there.
    pub fn relative(self) -> f64 {
        if self.off == 0.0 { 0.0 } else { (self.off / self.whole).sqrt() }
    }
}

impl Sum for Deviation {
    fn sum<I: Iterator<Item = Deviation>>(parts: I) -> Deviation {
        let add =
            |all: Deviation, part: Deviation| Deviation { off: all.off + part.off, whole: all.whole + part.whole };
        parts.fold(Deviation::default(), add)
    }
}
