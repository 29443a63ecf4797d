//! Round to nearest, on slices: absmax, scales, quantized values. Everything here is inlined into one vectorized closure.
//!
//! The rule: `scale = absmax / limit` in f32, rounded to the scale's own type; `q = w / scale` in f32, rounded half to
//! even, clamped to `-limit - 1 ..= limit`. Three corners:
//! - a slice of zeros has scale 1, never 0;
//! - where rounding left the scale so small that the largest weight would be clipped (a subnormal float16, or one that
//!   became 0), the scale is the next larger value of its type;
//! - a scale beyond the type is infinite: the caller refuses it.
use graphs::DType;
use graphs::interpret::ROUNDER;
use half::{bf16, f16};

/// A float type that weights are stored in.
pub(crate) trait Element: bytemuck::Pod + Send + Sync {
    /// Bits without the sign: they order like the magnitudes.
    type Magnitude: Ord + Copy;
    const ZERO: Self::Magnitude;
    /// The magnitude of infinity; NaN lies above it.
    const INFINITE: Self::Magnitude;

    fn magnitude(self) -> Self::Magnitude;
    fn from_magnitude(magnitude: Self::Magnitude) -> f32;
    /// Exact for finite values; infinities and NaN give a large number.
    fn widen(self) -> f32;
    /// Exact for normal values; zero and subnormal ones give something below the smallest normal one, [`Self::NORMAL`].
    #[inline(always)]
    fn widen_normal(self) -> f32 {
        self.widen()
    }
    /// Exact for all values.
    fn value(self) -> f32;
    /// The smallest normal value, where [`Self::widen_normal`] is another function than [`Self::widen`].
    const NORMAL: f32 = 0.0;
}

impl Element for f16 {
    type Magnitude = u16;
    const ZERO: u16 = 0;
    const INFINITE: u16 = 0x7c00;

    #[inline(always)]
    fn magnitude(self) -> u16 {
        self.to_bits() & 0x7fff
    }

    #[inline(always)]
    fn from_magnitude(magnitude: u16) -> f32 {
        f16::from_bits(magnitude).widen()
    }

    /// In integer operations, because those vectorize: `half`'s own conversion is a call per value or per eight.
    #[inline(always)]
    fn widen(self) -> f32 {
        let magnitude = u32::from(self.to_bits() & 0x7fff) << 13;
        let sign = u32::from(self.to_bits() & 0x8000) << 16;
        let normal = magnitude + (112 << 23);
        // A subnormal's mantissa below a leading one, and that one taken off again.
        let subnormal = f32::from_bits(magnitude | (113 << 23)) - f32::from_bits(113 << 23);
        f32::from_bits(sign | if magnitude < 1 << 23 { subnormal.to_bits() } else { normal })
    }

    #[inline(always)]
    fn widen_normal(self) -> f32 {
        let spread = (i32::from(self.to_bits() as i16) << 13) as u32 & 0x8fff_e000;
        f32::from_bits(spread + (112 << 23))
    }

    fn value(self) -> f32 {
        self.to_f32()
    }

    const NORMAL: f32 = 6.103_515_6e-5;
}

impl Element for bf16 {
    type Magnitude = u16;
    const ZERO: u16 = 0;
    const INFINITE: u16 = 0x7f80;

    #[inline(always)]
    fn magnitude(self) -> u16 {
        self.to_bits() & 0x7fff
    }

    #[inline(always)]
    fn from_magnitude(magnitude: u16) -> f32 {
        f32::from_bits(u32::from(magnitude) << 16)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn value(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f32 {
    type Magnitude = u32;
    const ZERO: u32 = 0;
    const INFINITE: u32 = 0x7f80_0000;

    #[inline(always)]
    fn magnitude(self) -> u32 {
        self.to_bits() & 0x7fff_ffff
    }

    #[inline(always)]
    fn from_magnitude(magnitude: u32) -> f32 {
        f32::from_bits(magnitude)
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    fn value(self) -> f32 {
        self
    }
}

/// The largest magnitude of a slice; NaN counts as larger than infinity.
#[inline(always)]
pub(crate) fn absmax<E: Element>(values: &[E]) -> E::Magnitude {
    values.iter().fold(E::ZERO, |most, value| most.max(value.magnitude()))
}

/// The scale of values up to `absmax` (finite), representable in `dtype`: never 0, infinite if `dtype` cannot hold it.
#[inline(always)]
pub(crate) fn scale(absmax: f32, limit: f32, dtype: DType) -> f32 {
    if absmax == 0.0 {
        return 1.0;
    }
    let (rounded, next) = match dtype {
        DType::Float16 => {
            let rounded = f16::from_f32(absmax / limit);
            (rounded.to_f32(), f16::from_bits(rounded.to_bits().saturating_add(1)).to_f32())
        }
        DType::Bfloat16 => {
            let rounded = bf16::from_f32(absmax / limit);
            (rounded.to_f32(), bf16::from_bits(rounded.to_bits().saturating_add(1)).to_f32())
        }
        _ => {
            let rounded = absmax / limit;
            (rounded, f32::from_bits(rounded.to_bits().saturating_add(1)))
        }
    };
    if rounded * (limit + 0.5) < absmax { next } else { rounded }
}

/// A scale from elsewhere as `dtype` holds it: never 0, not finite if `dtype` cannot hold it.
#[inline(always)]
pub(crate) fn given_scale(scale: f32, dtype: DType) -> f32 {
    let rounded = match dtype {
        DType::Float16 => f16::from_f32(scale).to_f32(),
        DType::Bfloat16 => bf16::from_f32(scale).to_f32(),
        _ => scale,
    };
    match rounded {
        0.0 if dtype == DType::Float16 && scale != 0.0 => f16::from_bits(1).to_f32(),
        // Of a group that holds nothing.
        0.0 => 1.0,
        _ => rounded,
    }
}

/// Adding this to a quotient rounds it to a multiple of 2^-13.
const SNAPPER: f32 = 1536.0;

/// Quantizes a slice under one scale of type `dtype`; `limit` is 127 or 7. The scale is the slice's own, from [`scale`].
#[inline(always)]
pub(crate) fn quantize<E: Element>(values: &[E], scale: f32, dtype: DType, limit: f32, into: &mut [u8]) {
    // A product with the reciprocal instead of a quotient. Both agree: weight and scale have 11 bits at most, so a
    // quotient up to 128 is a tie (k + 1/2) or at least 2^-12 away from any; the product is wrong by less than 2^-15;
    // snapped to multiples of 2^-13 ties are exact again and the others stay on their side.
    let short = size_of::<E>() == 2 && dtype.bits() == 16 && (1e-30..1e30).contains(&scale);
    // Below half a scale everything is 0, so the exact value of a subnormal does not matter.
    if short && scale >= 2.0 * E::NORMAL {
        let inverse = 1.0 / scale;
        for (value, into) in values.iter().zip(into) {
            *into = snapped(value.widen_normal(), inverse, limit);
        }
    } else if short {
        let inverse = 1.0 / scale;
        for (value, into) in values.iter().zip(into) {
            *into = snapped(value.widen(), inverse, limit);
        }
    } else {
        for (value, into) in values.iter().zip(into) {
            *into = (clamped(value.widen() / scale, limit) + ROUNDER).to_bits() as u8;
        }
    }
}

/// Quantizes a slice under a scale that may clip it at both ends.
#[inline(always)]
pub(crate) fn quantize_clipped<E: Element>(values: &[E], scale: f32, limit: f32, into: &mut [u8]) {
    for (value, into) in values.iter().zip(into) {
        let quotient = clamped(value.widen() / scale, limit);
        let quotient = if quotient < -limit - 1.0 { -limit - 1.0 } else { quotient };
        *into = (quotient + ROUNDER).to_bits() as u8;
    }
}

#[inline(always)]
fn snapped(value: f32, inverse: f32, limit: f32) -> u8 {
    let quotient = clamped(value * inverse + SNAPPER, SNAPPER + limit);
    (quotient + (ROUNDER - SNAPPER)).to_bits() as u8
}

/// The lower end needs no clamp: a slice's own scale keeps quotients above `-limit - 1/2`. A comparison is one
/// instruction where `f32::min` is three.
#[inline(always)]
fn clamped(quotient: f32, limit: f32) -> f32 {
    if quotient > limit { limit } else { quotient }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widening_is_exact_for_every_finite_half() {
        for bits in 0..=u16::MAX {
            let (half, brain) = (f16::from_bits(bits), bf16::from_bits(bits));
            assert!(!half.is_finite() || half.widen().to_bits() == half.to_f32().to_bits(), "{bits:#x}");
            assert!(!brain.is_finite() || brain.widen().to_bits() == brain.to_f32().to_bits(), "{bits:#x}");
            assert_eq!(half.is_finite(), half.magnitude() < f16::INFINITE);
            assert_eq!(brain.is_finite(), brain.magnitude() < bf16::INFINITE);
        }
    }

    #[test]
    fn scales_in_the_corners() {
        assert_eq!(scale(0.0, 127.0, DType::Float16), 1.0);
        assert_eq!(scale(127.0, 127.0, DType::Float16), 1.0);
        assert_eq!(scale(7.0 * 65504.0, 7.0, DType::Float16), 65504.0);
        assert_eq!(scale(8.0 * 65504.0, 7.0, DType::Float16), f32::INFINITY);
        let least = f16::from_bits(1).to_f32();
        assert_eq!(scale(least, 127.0, DType::Float16), least, "underflow keeps the smallest subnormal");
        assert_eq!(scale(least * 127.0 * 1.4, 127.0, DType::Float16), 2.0 * least, "rounded up where it would clip");
        assert_eq!(scale(least * 7.0 * 1.01, 7.0, DType::Float16), least);
        assert!(scale(f32::from_bits(1), 127.0, DType::Float32) > 0.0);
    }

    #[test]
    fn ties_go_to_even_and_the_upper_end_is_clamped() {
        let values = [0.5f32, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -126.5, -127.5];
        let mut bytes = [0; 10];
        quantize(&values, 1.0, DType::Float32, 127.0, &mut bytes);
        assert_eq!(bytes.map(|byte| byte as i8), [0, 2, 2, 0, -2, -2, 126, 127, -126, -128]);
        quantize(&values.map(f16::from_f32), 1.0, DType::Float16, 127.0, &mut bytes);
        assert_eq!(bytes.map(|byte| byte as i8), [0, 2, 2, 0, -2, -2, 126, 127, -126, -128]);
    }

    /// Every weight that a scale can meet, for scales of every mantissa and of the corner exponents.
    #[test]
    fn products_with_the_reciprocal_equal_quotients() {
        for limit in [7.0f32, 127.0] {
            for bits in (1..0x7c00u16).step_by(17).chain(0x3c00..0x3d00).chain(1..32) {
                for scale in [f16::from_bits(bits).to_f32(), bf16::from_bits(bits).to_f32()] {
                    let quotient = |value: f32| value / scale;
                    let fits = |value: &f16| quotient(value.to_f32()).abs() <= limit + 0.5;
                    let values: Vec<f16> = (0..0x7c00).map(f16::from_bits).flat_map(|v| [v, -v]).filter(fits).collect();
                    let mut bytes = vec![0; values.len()];
                    let dtype = if scale == f16::from_bits(bits).to_f32() { DType::Float16 } else { DType::Bfloat16 };
                    quantize(&values, scale, dtype, limit, &mut bytes);
                    for (value, byte) in values.iter().zip(bytes) {
                        let wanted = quotient(value.to_f32()).round_ties_even().min(limit);
                        assert_eq!(f32::from(byte as i8), wanted, "{value} / {scale}");
                    }
                }
            }
        }
    }
}
