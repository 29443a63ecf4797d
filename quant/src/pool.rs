//! Buffers that are used again. A fresh large buffer costs a page fault every 4 KiB on its first write, which takes
//! longer than quantizing into it.
use crate::Stored;
use std::sync::Mutex;

/// Bytes of earlier results, for [`crate::materialize_with`].
#[derive(Default)]
pub struct Pool {
    buffers: Mutex<Vec<Vec<u8>>>,
}

impl Pool {
    /// Takes back the bytes of a result that is no longer needed.
    pub fn give(&self, stored: Stored) {
        let Ok(mut buffers) = self.buffers.lock() else { return };
        buffers.push(stored.bytes);
        buffers.extend(stored.scale.map(|scale| scale.bytes));
    }

    /// A buffer of `length` bytes that hold anything: the smallest that is large enough, else a fresh one.
    pub(crate) fn take(&self, length: usize) -> Vec<u8> {
        let found = self.buffers.lock().ok().and_then(|mut buffers| {
            let fitting = buffers.iter().enumerate().filter(|(_, buffer)| buffer.capacity() >= length);
            // A buffer much too large would be held by a small result.
            let best = fitting.min_by_key(|(_, buffer)| buffer.capacity()).map(|(at, buffer)| (at, buffer.capacity()));
            best.filter(|(_, capacity)| capacity / 2 <= length.max(4096)).map(|(at, _)| buffers.swap_remove(at))
        });
        match found {
            Some(mut buffer) => {
                buffer.resize(length, 0);
                buffer
            }
            None => vec![0; length],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use graphs::DType;

    #[test]
    fn gives_back_what_fits() {
        let pool = Pool::default();
        let stored = |length| Stored { dtype: DType::Uint8, shape: vec![length], bytes: vec![1; length], scale: None };
        pool.give(Stored { scale: Some(Box::new(stored(100_000))), ..stored(1 << 20) });
        assert_eq!(pool.take(10), vec![0; 10], "no large buffer for a small result");
        assert_eq!(pool.take(90_000), vec![1; 90_000]);
        assert!(pool.take(90_000).iter().all(|byte| *byte == 0), "each is given once");
        assert_eq!(pool.take(1 << 20).len(), 1 << 20);
    }
}
