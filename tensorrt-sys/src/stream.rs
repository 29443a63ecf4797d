//! The engine on its way out: an `IStreamWriter` that hashes what passes and remembers its own failure, since TensorRT
//! does not look at what it returns.
use crate::abi::{InterfaceInfo, Object, Table, api_language, no_destructor};
use sha2::{Digest, Sha256};
use std::ffi::c_void;
use std::io::Write;

/// Size and digest of a written engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuildSummary {
    pub bytes: u64,
    /// SHA-256 in hexadecimal.
    pub sha256: String,
    /// What the builder measured, for the next build; TensorRT 10 and later.
    pub timing_cache: Option<Vec<u8>>,
}

#[repr(C)]
pub(crate) struct StreamWriter<'w> {
    table: *const c_void,
    out: &'w mut dyn Write,
    hash: Sha256,
    bytes: u64,
    failure: Option<std::io::Error>,
}

static TABLE: Table<5> = Table::new([api_language as _, info as _, no_destructor as _, no_destructor as _, write as _]);

impl<'w> StreamWriter<'w> {
    pub(crate) fn new(out: &'w mut dyn Write) -> StreamWriter<'w> {
        StreamWriter { table: TABLE.pointer(), out, hash: Sha256::new(), bytes: 0, failure: None }
    }

    pub(crate) fn object(&mut self) -> Object {
        std::ptr::from_mut(self).cast()
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) -> bool {
        if self.failure.is_none() {
            match self.out.write_all(bytes) {
                Ok(()) => {
                    self.hash.update(bytes);
                    self.bytes += bytes.len() as u64;
                }
                Err(error) => self.failure = Some(error),
            }
        }
        self.failure.is_none()
    }

    pub(crate) fn finish(self) -> std::io::Result<BuildSummary> {
        if let Some(error) = self.failure {
            return Err(error);
        }
        self.out.flush()?;
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(BuildSummary { bytes: self.bytes, sha256, timing_cache: None })
    }
}

extern "C" fn info(_: Object) -> InterfaceInfo {
    InterfaceInfo { kind: c"IStreamWriter".as_ptr(), major: 1, minor: 0 }
}

extern "C" fn write(this: Object, data: *const c_void, count: i64) -> i64 {
    let written = std::panic::catch_unwind(|| {
        let length = usize::try_from(count).ok().filter(|_| !data.is_null())?;
        // SAFETY: TensorRT passes the writer it was given, alive during the build, and `count` bytes.
        let (writer, bytes) =
            unsafe { (&mut *this.cast::<StreamWriter>(), std::slice::from_raw_parts(data.cast::<u8>(), length)) };
        writer.write(bytes).then_some(count)
    });
    written.ok().flatten().unwrap_or(0)
}
