//! What the GPU at hand can do at most, measured: memory by a large copy, arithmetic by a large matrix product.
#![expect(unsafe_code, reason = "cuBLASLt is called on raw buffers; the block says why that holds")]
use crate::device::{Device, DeviceError};
use cudarc::cublaslt::{CudaBlasLT, Matmul, MatmulConfig};
use half::f16;
use rayon::prelude::*;
use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    pub gpu: String,
    /// Bytes read and written a second by a copy within the GPU.
    pub copy_bytes_per_second: f64,
    /// Of a float16 product of matrices of 8192 x 8192 by cuBLASLt; none where that library is not there.
    pub operations_per_second: Option<f64>,
}

const COPY: usize = 2 << 30;
const SIDE: usize = 8192;
const RUNS: usize = 9;

/// Measures both.
///
/// # Errors
/// What the driver says, mostly for want of memory.
pub fn limits(device: &Device) -> Result<Limits, DeviceError> {
    let from = device.allocate(COPY)?;
    let mut to = device.allocate(COPY)?;
    let seconds = median(device, || device.copy(&from, &mut to, 0, COPY))?;
    let copy_bytes_per_second = 2.0 * COPY as f64 / seconds;
    drop((from, to));
    Ok(Limits { gpu: device.gpu()?.name, copy_bytes_per_second, operations_per_second: product(device)? })
}

/// Median seconds of a piece of work, after two runs that do not count.
pub fn median<E: From<DeviceError>>(device: &Device, mut work: impl FnMut() -> Result<(), E>) -> Result<f64, E> {
    let mut times = Vec::new();
    for run in 0..RUNS + 2 {
        let milliseconds = device.time(&mut work)?;
        if run >= 2 {
            times.push(milliseconds / 1e3);
        }
    }
    Ok(middle(times))
}

/// The median, NaN of nothing.
pub fn middle(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn product(device: &Device) -> Result<Option<f64>, DeviceError> {
    // SAFETY: it only tries to load the library.
    if !unsafe { cudarc::cublaslt::sys::is_culib_present() } {
        return Ok(None);
    }
    let Ok(blas) = CudaBlasLT::new(device.stream().clone()) else { return Ok(None) };
    let failed = |source| DeviceError::Cuda { action: "copy to the GPU", source };
    // Zeros would be multiplied faster than real numbers.
    let number = |place: usize| {
        let bits = (place as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        f16::from_f32(bits as f32 / (1 << 23) as f32 - 1.0)
    };
    let values: Vec<f16> = (0..SIDE * SIDE).into_par_iter().map(number).collect();
    let stream = device.stream();
    let (a, b) = (stream.clone_htod(&values).map_err(failed)?, stream.clone_htod(&values).map_err(failed)?);
    let mut c = stream.alloc_zeros::<f16>(SIDE * SIDE).map_err(failed)?;
    let (side, stride) = (SIDE as u64, SIDE as i64);
    let config = MatmulConfig {
        transa: true,
        transb: false,
        transc: false,
        m: side,
        n: side,
        k: side,
        alpha: 1.0,
        lda: stride,
        ldb: stride,
        beta: 0.0,
        ldc: stride,
        stride_a: None,
        stride_b: None,
        stride_c: None,
        stride_bias: None,
        batch_size: None,
    };
    let mut refused = false;
    let seconds = median(device, || {
        // SAFETY: the three buffers hold square matrices of the sides that the configuration names.
        refused |= unsafe { blas.matmul(config, &a, &b, &mut c, None, None) }.is_err();
        Ok::<_, DeviceError>(())
    })?;
    let operations = 2.0 * (SIDE as f64).powi(3);
    Ok((!refused).then_some(operations / seconds))
}
