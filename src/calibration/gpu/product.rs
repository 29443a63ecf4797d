//! Matrix products by cuBLASLt, on addresses.
#![expect(unsafe_code, reason = "cuBLASLt is a C interface on addresses; each block says why it holds")]
use crate::device::Device;
use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, DevicePtr};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

/// Bytes that NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// The most that an address is said to be a multiple of.
const ALIGNED: u64 = 256;

/// Column-major matrices of float32: c `[m, n]` = a `[m, k]` times b `[k, n]`, each transposed where it is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Product {
    pub(super) transposed: [bool; 2],
    pub(super) m: usize,
    pub(super) n: usize,
    pub(super) k: usize,
    /// Elements from one column as stored to the next, of a, b and c.
    pub(super) columns: [usize; 3],
    pub(super) batch: usize,
    /// Elements from one matrix of the batch to the next, of a, b and c.
    pub(super) steps: [usize; 3],
    /// Factors are read as TF32, 11 bits; sums are float32 always.
    pub(super) tf32: bool,
    /// Added to what c holds.
    pub(super) add: bool,
}

pub(super) struct Blas {
    device: Device,
    handle: sys::cublasLtHandle_t,
    workspace: CudaSlice<u8>,
    /// The way chosen for each product, by how its addresses are aligned.
    chosen: RefCell<HashMap<(Product, [u64; 3]), sys::cublasLtMatmulAlgo_t>>,
}

impl Drop for Blas {
    fn drop(&mut self) {
        // SAFETY: the handle is live and not used again; the stream is done before, so that no product still runs.
        let _ = self.device.wait().map(|()| unsafe { result::destroy_handle(self.handle) });
    }
}

impl Blas {
    /// Nothing where the library is not there.
    ///
    /// # Errors
    /// A library or a GPU that does not serve.
    pub(super) fn open(device: &Device) -> Result<Option<Blas>, String> {
        // SAFETY: it only tries to load the library, whose initializers do nothing.
        if !unsafe { sys::is_culib_present() } {
            return Ok(None);
        }
        let handle = result::create_handle().map_err(|error| format!("cuBLASLt: {error}"))?;
        let workspace = device.allocate(WORKSPACE).map_err(|error| error.to_string())?;
        Ok(Some(Blas { device: device.clone(), handle, workspace, chosen: RefCell::default() }))
    }

    /// Puts a product on the stream.
    ///
    /// # Safety
    /// a, b and c are addresses of device memory that holds all elements which the product names; c is none of the others.
    ///
    /// # Errors
    /// What cuBLASLt refuses.
    pub(super) unsafe fn multiply(&self, product: Product, addresses: [u64; 3]) -> Result<(), String> {
        // SAFETY: the caller's promise.
        unsafe { self.start(product, addresses) }.map_err(|error| format!("cuBLASLt: {error} for {product:?}"))
    }

    unsafe fn start(&self, product: Product, addresses: [u64; 3]) -> Result<(), CublasError> {
        let Product { transposed, m, n, k, columns, batch, steps, tf32, add } = product;
        let [a, b, c] = addresses;
        let alignment = addresses.map(|address| ALIGNED.min(1 << address.trailing_zeros().min(8)));
        let shape = |rows: usize, columns: usize, turned: bool| if turned { (columns, rows) } else { (rows, columns) };
        let layouts = [
            Layout::new(shape(m, k, transposed[0]), columns[0], batch, steps[0])?,
            Layout::new(shape(k, n, transposed[1]), columns[1], batch, steps[1])?,
            Layout::new((m, n), columns[2], batch, steps[2])?,
        ];
        let description = Description::new(tf32, transposed)?;
        let key = (product, alignment);
        let known = self.chosen.borrow().get(&key).copied();
        let algorithm = match known {
            Some(algorithm) => algorithm,
            None => {
                let algorithm = self.choose(&description, &layouts, alignment)?;
                self.chosen.borrow_mut().insert(key, algorithm);
                algorithm
            }
        };
        let (one, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        let (workspace, _guard) = self.workspace.device_ptr(self.device.stream());
        // SAFETY: descriptions live until the call returns; the memory is the caller's promise; the workspace is used by one
        // product at a time because all go to one stream.
        unsafe {
            result::matmul(
                self.handle,
                description.0,
                (&raw const one).cast(),
                (&raw const beta).cast(),
                a as *const c_void,
                layouts[0].0,
                b as *const c_void,
                layouts[1].0,
                c as *const c_void,
                layouts[2].0,
                c as *mut c_void,
                layouts[2].0,
                &raw const algorithm,
                workspace as *mut c_void,
                WORKSPACE,
                self.device.raw_stream().cast(),
            )
        }
    }

    fn choose(
        &self,
        description: &Description,
        layouts: &[Layout; 3],
        alignment: [u64; 3],
    ) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
        let preference = Preference(result::create_matmul_pref()?);
        let aligned = alignment.map(|bytes| bytes as u32);
        let bytes = [
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, aligned[0]),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, aligned[1]),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, aligned[2]),
            (Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, aligned[2]),
        ];
        let ([a, b, c], workspace) = (layouts, WORKSPACE);
        // SAFETY: all descriptions are live; each attribute has the type that cublasLt.h names for it.
        unsafe {
            let limit = Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            result::set_matmul_pref_attribute(preference.0, limit, (&raw const workspace).cast(), size_of::<usize>())?;
            for (attribute, value) in &bytes {
                let value: *const u32 = value;
                result::set_matmul_pref_attribute(preference.0, *attribute, value.cast(), size_of::<u32>())?;
            }
            let found =
                result::get_matmul_algo_heuristic(self.handle, description.0, a.0, b.0, c.0, c.0, preference.0)?;
            Ok(found.algo)
        }
    }
}

struct Layout(sys::cublasLtMatrixLayout_t);

impl Layout {
    fn new((rows, columns): (usize, usize), column: usize, batch: usize, step: usize) -> Result<Layout, CublasError> {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        let float = sys::cudaDataType_t::CUDA_R_32F;
        let layout = Layout(result::create_matrix_layout(float, rows as u64, columns as u64, column as i64)?);
        let (batch, step) = (batch as i32, step as i64);
        // SAFETY: the layout is live; a batch count is an int32 and a stride an int64 in cublasLt.h.
        unsafe {
            let count = Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT;
            result::set_matrix_layout_attribute(layout.0, count, (&raw const batch).cast(), size_of::<i32>())?;
            let stride = Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
            result::set_matrix_layout_attribute(layout.0, stride, (&raw const step).cast(), size_of::<i64>())?;
        }
        Ok(layout)
    }
}

impl Drop for Layout {
    fn drop(&mut self) {
        // SAFETY: it is live and not used again.
        let _ = unsafe { result::destroy_matrix_layout(self.0) };
    }
}

struct Description(sys::cublasLtMatmulDesc_t);

impl Description {
    fn new(tf32: bool, transposed: [bool; 2]) -> Result<Description, CublasError> {
        use sys::cublasComputeType_t as Compute;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let compute = if tf32 { Compute::CUBLAS_COMPUTE_32F_FAST_TF32 } else { Compute::CUBLAS_COMPUTE_32F };
        let description = Description(result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)?);
        let attributes = [Attribute::CUBLASLT_MATMUL_DESC_TRANSA, Attribute::CUBLASLT_MATMUL_DESC_TRANSB];
        for (attribute, transposed) in std::iter::zip(attributes, transposed) {
            let operation = i32::from(transposed);
            // SAFETY: the description is live; an operation is an int32 in cublasLt.h, 1 to transpose.
            unsafe {
                let value = (&raw const operation).cast();
                result::set_matmul_desc_attribute(description.0, attribute, value, size_of::<i32>())?;
            }
        }
        Ok(description)
    }
}

impl Drop for Description {
    fn drop(&mut self) {
        // SAFETY: it is live and not used again.
        let _ = unsafe { result::destroy_matmul_desc(self.0) };
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: it is live and not used again.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
