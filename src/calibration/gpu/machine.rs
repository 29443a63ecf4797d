//! The GPU as calibration uses it: memory of floats, our kernels, products. Lengths are checked here, so that callers need
//! no unsafe code.
#![expect(unsafe_code, reason = "kernels take addresses; lengths are checked before each start")]
use super::GpuError;
use super::product::{Blas, Product};
use crate::backend::{Kind, find};
use crate::device::Device;
use crate::plugins::{Compiler, Kernels, Launch};
use cudarc::driver::{CudaSlice, DevicePtr, DeviceRepr, DriverError};
use graphs::{ActivationKind, BinaryKind, DType, NormKind};
use std::ops::Range;

/// Floats in device memory; at least one, so that they have an address.
pub(super) type Floats = CudaSlice<f32>;

/// The kernels' source, for the test that compiles them.
pub const KERNELS: &str = include_str!("kernels.cu");

/// Threads of a block, as the source has it.
const THREADS: usize = 256;
/// Blocks of a pointwise kernel, at most.
const BLOCKS: usize = 1 << 16;
/// Rows whose columns one block sums.
const STEP: usize = 2048;
/// Floats of a part of the inputs whose product is made in one go, because their two halves are made first.
const SPLIT: usize = 1 << 27;

pub struct Machine {
    device: Device,
    kernels: Kernels,
    blas: Blas,
}

/// What a kernel takes.
enum Argument {
    Address(u64),
    Count(usize),
    Int(i32),
    Float(f32),
}

use Argument::{Address, Count, Float, Int};

/// A matrix `[out, in]` and whether TF32 holds its values.
pub(super) struct Matrix {
    pub(super) values: Floats,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) exact: bool,
}

/// Attention of one request: places of its first query, key and value, and their numbers.
#[derive(Clone, Copy)]
pub(super) struct Request {
    pub(super) query: usize,
    pub(super) key: usize,
    pub(super) tokens: usize,
    pub(super) keys: usize,
}

/// Sizes of attention heads.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) dim: usize,
    pub(super) scale: f32,
    pub(super) causal: bool,
}

type Result<T> = std::result::Result<T, String>;

fn need(fits: bool) -> Result<()> {
    if fits { Ok(()) } else { Err("sizes do not fit on the GPU".into()) }
}

fn driver(error: DriverError) -> String {
    format!("the GPU: {error}")
}

impl Machine {
    /// Opens the first GPU.
    ///
    /// # Errors
    /// No GPU, or no NVRTC or cuBLASLt.
    pub fn open() -> std::result::Result<Machine, GpuError> {
        let device = Device::open()?;
        device.keep_memory()?;
        let compiler = Compiler::new(&find(Kind::Nvrtc)?, device.gpu()?.capability)?;
        let kernels = Kernels::new(compiler.compile("calibration.cu", KERNELS, Vec::new())?);
        let blas = Blas::open(&device).map_err(GpuError::Blas)?.ok_or(GpuError::NoBlas)?;
        Ok(Machine { device, kernels, blas })
    }

    /// Name of the GPU.
    pub fn name(&self) -> String {
        self.device.gpu().map_or_else(|_| "GPU".into(), |gpu| gpu.name)
    }

    /// Bytes that nobody uses; none where the driver does not say.
    pub fn free_memory(&self) -> usize {
        self.device.free_memory().unwrap_or(0)
    }

    fn address<T>(&self, slice: &CudaSlice<T>) -> Argument {
        Address(slice.device_ptr(self.device.stream()).0)
    }

    /// Memory that holds anything.
    pub(super) fn fresh(&self, count: usize) -> Result<Floats> {
        // SAFETY: every kernel that is given such memory as its result writes all of it before anything reads it.
        unsafe { self.device.stream().alloc(count.max(1)) }.map_err(driver)
    }

    pub(super) fn upload<T: DeviceRepr>(&self, values: &[T]) -> Result<CudaSlice<T>> {
        // SAFETY: filled right below; an empty slice has one element that nothing reads.
        let mut slice = unsafe { self.device.stream().alloc(values.len().max(1)) }.map_err(driver)?;
        if !values.is_empty() {
            let mut view = slice.try_slice_mut(..values.len()).ok_or("sizes do not fit on the GPU")?;
            self.device.stream().memcpy_htod(values, &mut view).map_err(driver)?;
        }
        Ok(slice)
    }

    pub(super) fn upload_at(&self, values: &[f32], to: &mut Floats, place: usize) -> Result<()> {
        if values.is_empty() {
            return Ok(());
        }
        let mut view = to.try_slice_mut(place..place + values.len()).ok_or("sizes do not fit on the GPU")?;
        self.device.stream().memcpy_htod(values, &mut view).map_err(driver)
    }

    pub(super) fn download<T: DeviceRepr>(&self, from: &CudaSlice<T>, range: Range<usize>) -> Result<Vec<T>> {
        if range.is_empty() {
            return Ok(Vec::new());
        }
        let view = from.try_slice(range).ok_or("sizes do not fit on the GPU")?;
        let copied = self.device.stream().clone_dtoh(&view).map_err(driver)?;
        self.device.wait().map_err(|error| error.to_string())?;
        Ok(copied)
    }

    pub(super) fn copy(&self, from: &Floats) -> Result<Floats> {
        let mut to = self.fresh(from.len())?;
        self.device.stream().memcpy_dtod(from, &mut to).map_err(driver)?;
        Ok(to)
    }

    /// # Safety
    /// The arguments are those of the kernel, and what they name in memory is as long as it touches.
    unsafe fn start(&self, name: &str, grid: [usize; 3], arguments: &mut [Argument]) -> Result<()> {
        let mut pointers: Vec<_> = arguments
            .iter_mut()
            .map(|argument| match argument {
                Address(value) => std::ptr::from_mut(value).cast(),
                Count(value) => std::ptr::from_mut(value).cast(),
                Int(value) => std::ptr::from_mut(value).cast(),
                Float(value) => std::ptr::from_mut(value).cast(),
            })
            .collect();
        let launch = Launch { grid, threads: THREADS as u32, shared: 0 };
        // SAFETY: the caller's promise.
        unsafe { self.kernels.launch(name, launch, self.device.raw_stream(), &mut pointers) }
    }

    fn blocks(count: usize) -> [usize; 3] {
        [count.div_ceil(THREADS).min(BLOCKS), 1, 1]
    }

    /// Values of a float type, stored in 16 bits, as floats.
    pub(super) fn widen(&self, bytes: &[u8], dtype: DType) -> Result<Floats> {
        let count = bytes.len() / 2;
        let halves = self.upload(bytes)?;
        let to = self.fresh(count)?;
        let kind = if dtype == DType::Float16 { 1 } else { 2 };
        let mut arguments = [self.address(&halves), self.address(&to), Count(count), Int(kind)];
        // SAFETY: both hold `count` values.
        unsafe { self.start("widen", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    pub(super) fn pair(&self, a: &Floats, b: &Floats, count: usize, kind: BinaryKind) -> Result<Floats> {
        need(a.len() >= count && b.len() >= count)?;
        let to = self.fresh(count)?;
        let kind = match kind {
            BinaryKind::Add => 0,
            BinaryKind::Multiply => 1,
        };
        let mut arguments = [self.address(a), self.address(b), self.address(&to), Count(count), Int(kind)];
        // SAFETY: all hold `count` values.
        unsafe { self.start("pair", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    /// With a vector repeated: added (0), multiplied (1), divided by (2).
    pub(super) fn along(&self, x: &Floats, vector: &Floats, width: usize, count: usize, kind: i32) -> Result<Floats> {
        need(x.len() >= count && vector.len() >= width && width > 0)?;
        let to = self.fresh(count)?;
        let (x, vector, into) = (self.address(x), self.address(vector), self.address(&to));
        let mut arguments = [x, vector, into, Count(count), Count(width), Int(kind)];
        // SAFETY: x and the result hold `count` values, the vector `width`.
        unsafe { self.start("along", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    pub(super) fn scale(&self, x: &Floats, count: usize, factor: f32) -> Result<Floats> {
        need(x.len() >= count)?;
        let to = self.fresh(count)?;
        let mut arguments = [self.address(x), self.address(&to), Count(count), Float(factor)];
        // SAFETY: both hold `count` values.
        unsafe { self.start("scale", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    pub(super) fn activation(&self, x: &Floats, count: usize, kind: ActivationKind) -> Result<Floats> {
        need(x.len() >= count)?;
        let to = self.fresh(count)?;
        let kind = match kind {
            ActivationKind::Relu => 0,
            ActivationKind::Silu => 1,
            ActivationKind::Gelu => 2,
            ActivationKind::GeluTanh => 3,
            ActivationKind::QuickGelu => 4,
        };
        let mut arguments = [self.address(x), self.address(&to), Count(count), Int(kind)];
        // SAFETY: both hold `count` values.
        unsafe { self.start("activation", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    pub(super) fn norm(
        &self,
        x: &Floats,
        rows: usize,
        kind: NormKind,
        [weight, bias]: [Option<&Floats>; 2],
        epsilon: f32,
    ) -> Result<Floats> {
        let weight = weight.ok_or("its weight is not loaded")?;
        let width = weight.len();
        need(x.len() >= rows * width && bias.is_none_or(|bias| bias.len() >= width))?;
        let to = self.fresh(rows * width)?;
        let bias = bias.map_or(Address(0), |bias| self.address(bias));
        let (x, weight, into) = (self.address(x), self.address(weight), self.address(&to));
        let layer = i32::from(kind == NormKind::Layer);
        let mut arguments = [x, weight, bias, into, Int(width as i32), Float(epsilon), Int(layer)];
        // SAFETY: a block reads and writes one of the `rows` rows; the vectors hold `width` values.
        unsafe { self.start("norm", [rows, 1, 1], &mut arguments) }?;
        Ok(to)
    }

    /// x `[rows, heads, dim]`, turned by the positions of the rows.
    pub(super) fn rotate(
        &self,
        x: &Floats,
        positions: &CudaSlice<i32>,
        frequencies: &Floats,
        rows: usize,
        heads: usize,
    ) -> Result<Floats> {
        let half = frequencies.len();
        need(x.len() >= rows * heads * half * 2 && positions.len() >= rows)?;
        let to = self.fresh(x.len())?;
        let count = rows * heads * half;
        let (x, positions, frequencies) = (self.address(x), self.address(positions), self.address(frequencies));
        let into = self.address(&to);
        let mut arguments = [x, positions, frequencies, into, Count(count), Int(heads as i32), Int(half as i32)];
        // SAFETY: x and the result hold 2 * `count` values, there is a position for each row.
        unsafe { self.start("rotate", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    /// Rows of a table `[.., width]`.
    pub(super) fn rows(&self, table: &Floats, index: &[i32], width: usize) -> Result<Floats> {
        let inside = |&row: &i32| usize::try_from(row).is_ok_and(|row| (row + 1) * width <= table.len());
        need(width > 0 && index.iter().all(inside))?;
        let places = self.upload(index)?;
        let count = index.len() * width;
        let to = self.fresh(count)?;
        let (table, places, into) = (self.address(table), self.address(&places), self.address(&to));
        let mut arguments = [table, places, into, Count(count), Count(width)];
        // SAFETY: every index is inside the table, and the result holds a row for each.
        unsafe { self.start("rows", Self::blocks(count), &mut arguments) }?;
        Ok(to)
    }

    /// Largest magnitude and sum of magnitudes of each column of x `[rows, width]`; a column that holds NaN or infinity has
    /// that as its largest.
    pub(super) fn columns(&self, x: &Floats, rows: usize, width: usize) -> Result<(Vec<f32>, Vec<f64>)> {
        need(x.len() >= rows * width)?;
        let parts = rows.div_ceil(STEP);
        let most = self.upload(&vec![0u32; parts * width])?;
        let sums = self.upload(&vec![0f64; parts * width])?;
        let (rows, columns, step) = (Count(rows), Int(width as i32), Int(STEP as i32));
        let mut arguments = [self.address(x), self.address(&most), self.address(&sums), rows, columns, step];
        // SAFETY: x holds the rows; the results hold a row for each of the grid's parts.
        unsafe { self.start("columns", [width.div_ceil(32), parts, 1], &mut arguments) }?;
        let (most, sums) = (self.download(&most, 0..parts * width)?, self.download(&sums, 0..parts * width)?);
        let (mut absmax, mut sum) = (vec![0u32; width], vec![0f64; width]);
        for (most, sums) in std::iter::zip(most.chunks_exact(width.max(1)), sums.chunks_exact(width.max(1))) {
            std::iter::zip(&mut absmax, most).for_each(|(absmax, most)| *absmax = *most.max(absmax));
            std::iter::zip(&mut sum, sums).for_each(|(sum, more)| *sum += more);
        }
        Ok((absmax.into_iter().map(f32::from_bits).collect(), sum))
    }

    /// x `[rows, in]` times a matrix's transpose. TF32 tensor cores keep 11 bits of each factor. Weights of 16 bits have no
    /// more; inputs are split in two numbers of 11 bits each and both are multiplied, which leaves errors like float32's.
    /// Other weights are multiplied in float32.
    pub(super) fn linear(&self, x: &Floats, matrix: &Matrix, rows: usize) -> Result<Floats> {
        let Matrix { values, outputs, inputs, exact } = matrix;
        need(x.len() >= rows * inputs && values.len() >= outputs * inputs)?;
        let to = self.fresh(rows * outputs)?;
        let (Address(x), Address(weight), Address(into)) = (self.address(x), self.address(values), self.address(&to))
        else {
            return need(false).map(|()| to);
        };
        let product = |rows: usize, tf32: bool, add: bool| Product {
            transposed: [true, false],
            m: *outputs,
            n: rows,
            k: *inputs,
            columns: [*inputs, *inputs, *outputs],
            batch: 1,
            steps: [0, 0, 0],
            tf32,
            add,
        };
        if rows == 0 {
            return Ok(to);
        }
        if !exact {
            // SAFETY: x holds `rows` rows of inputs, the result as many of outputs.
            unsafe { self.blas.multiply(product(rows, false, false), [weight, x, into]) }?;
            return Ok(to);
        }
        let part = (SPLIT / (*inputs).max(1)).clamp(1, rows);
        let (high, low) = (self.fresh(part * inputs)?, self.fresh(part * inputs)?);
        for first in (0..rows).step_by(part) {
            let count = part.min(rows - first);
            let (x, into) = (x + (first * inputs * 4) as u64, into + (first * outputs * 4) as u64);
            let mut arguments = [Address(x), self.address(&high), self.address(&low), Count(count * inputs)];
            // SAFETY: x holds `count` rows from here on, both halves hold as many, the result as many of outputs.
            unsafe {
                self.start("split", Self::blocks(count * inputs), &mut arguments)?;
                for (half, add) in [(&high, false), (&low, true)] {
                    let Address(half) = self.address(half) else { continue };
                    self.blas.multiply(product(count, true, add), [weight, half, into])?;
                }
            }
        }
        Ok(to)
    }

    /// softmax(scale q k^T) v of one request, written to its rows of the result; queries `[.., heads * dim]`, keys and values
    /// `[.., kv_heads * dim]`; `scores` is room for `[heads, tokens, keys]`.
    pub(super) fn attend(
        &self,
        [query, key, value, scores, result]: [&Floats; 5],
        heads: Heads,
        request: Request,
    ) -> Result<()> {
        let Heads { heads, kv_heads, dim, scale, causal } = heads;
        let Request { query: first, key: first_key, tokens, keys } = request;
        if tokens == 0 || keys == 0 || heads == 0 {
            return Ok(());
        }
        let (wide, narrow, group) = (heads * dim, kv_heads * dim, heads / kv_heads.max(1));
        need(kv_heads > 0 && heads == group * kv_heads && scores.len() >= heads * tokens * keys)?;
        need([query, result].iter().all(|rows| rows.len() >= (first + tokens) * wide))?;
        need([key, value].iter().all(|rows| rows.len() >= (first_key + keys) * narrow))?;
        let at = |floats: &Floats, place: usize| floats.device_ptr(self.device.stream()).0 + (place * 4) as u64;
        let area = tokens * keys;
        let common = Product {
            transposed: [true, false],
            m: keys,
            n: tokens,
            k: dim,
            columns: [narrow, wide, keys],
            batch: kv_heads,
            steps: [dim, group * dim, group * area],
            tf32: false,
            add: false,
        };
        let mixed = Product {
            transposed: [false, false],
            m: dim,
            k: keys,
            columns: [narrow, keys, wide],
            steps: [dim, group * area, group * dim],
            ..common
        };
        // SAFETY: all rows named are inside their memory, as checked above; members of a group of heads lie beside each other.
        unsafe {
            for member in 0..group {
                let query = at(query, first * wide + member * dim);
                let into = at(scores, member * area);
                self.blas.multiply(common, [at(key, first_key * narrow), query, into])?;
            }
            let (rows, keys) = (Int(tokens as i32), Int(keys as i32));
            let mut arguments = [self.address(scores), rows, keys, Float(scale), Int(i32::from(causal))];
            self.start("softmax", [heads * tokens, 1, 1], &mut arguments)?;
            for member in 0..group {
                let into = at(result, first * wide + member * dim);
                self.blas.multiply(mixed, [at(value, first_key * narrow), at(scores, member * area), into])?;
            }
        }
        Ok(())
    }
}
