//! Weights per second of quantizing from a warm file, beside a plain read of the same bytes and a naive version.
//! `cargo bench -p quant`; prints a table, asserts nothing. `RAYON_NUM_THREADS` sets the threads.
use graphs::{DType, Format, Weight};
use half::f16;
use quant::{Entry, Pool, Source, SourceError, materialize_with};
use rayon::prelude::*;
use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::time::Instant;

const OUT: usize = 11008;
const INPUT: usize = 4096;
const TENSORS: usize = 6;
const ROUNDS: usize = 5;

/// One file of equal matrices, named by their number.
struct Matrices(File);

impl Source for Matrices {
    fn entry(&self, _: &str) -> Option<Entry> {
        Some(Entry { dtype: DType::Float16, shape: vec![OUT, INPUT] })
    }

    fn read(&self, name: &str, offset: u64, buffer: &mut [u8]) -> Result<(), SourceError> {
        let number: u64 = name.parse().map_err(SourceError::new)?;
        self.0.read_exact_at(buffer, number * (2 * OUT * INPUT) as u64 + offset).map_err(SourceError::new)
    }
}

/// Removes the file when the bench ends, however it ends.
struct Removed(std::path::PathBuf);

impl Drop for Removed {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = Removed(std::env::temp_dir().join(format!("quantize-bench-{}", std::process::id())));
    write_file(&path.0)?;
    let source = Matrices(File::open(&path.0)?);
    let weights = (TENSORS * OUT * INPUT) as f64;
    println!(
        "{TENSORS} float16 matrices [{OUT}, {INPUT}], {} threads, best of {ROUNDS} (median)",
        rayon::current_num_threads()
    );
    println!("{:<34}{:>12}{:>12}{:>12}", "", "G weights/s", "median", "GB/s read");

    report("plain read, all threads", weights, || {
        (0..TENSORS).for_each(|tensor| {
            (0..OUT).into_par_iter().step_by(128).for_each_init(
                || vec![0; 128 * INPUT * 2],
                |buffer, row| {
                    let offset = ((tensor * OUT + row) * INPUT * 2) as u64;
                    if let Err(error) = source.0.read_exact_at(buffer, offset) {
                        println!("read: {error}");
                    }
                },
            );
        });
    });
    let pool = Pool::default();
    let (int8, int4) = (Some(Format::Int8), Some(Format::Int4 { group: 128 }));
    for (label, format, reused) in [
        ("plain copy, buffer reused", None, true),
        ("int8, buffer reused", int8, true),
        ("int4 g128, buffer reused", int4, true),
        ("plain copy, fresh buffer", None, false),
        ("int8, fresh buffer", int8, false),
        ("int4 g128, fresh buffer", int4, false),
    ] {
        report(label, weights, || {
            for tensor in 0..TENSORS {
                let weight = Weight::tensor(tensor.to_string(), &[OUT, INPUT]);
                let weight = match format {
                    Some(format) => weight.packed(format),
                    None => weight,
                };
                match materialize_with(&weight, &source, DType::Float16, &pool) {
                    Ok(stored) if reused => pool.give(std::hint::black_box(stored)),
                    Ok(stored) => drop(std::hint::black_box(stored)),
                    Err(error) => println!("{label}: {error}"),
                }
            }
        });
    }
    let mut bytes = vec![0; 2 * OUT * INPUT];
    source.0.read_exact_at(&mut bytes, 0)?;
    report("naive int8, 1 thread, in memory", (OUT * INPUT) as f64, || drop(std::hint::black_box(naive(&bytes))));
    Ok(())
}

fn report(label: &str, weights: f64, mut run: impl FnMut()) {
    // Words after `--` choose the rows of the table; cargo itself adds `--bench`.
    let mut filters = std::env::args().skip(1).filter(|word| !word.starts_with('-')).peekable();
    if filters.peek().is_some() && !filters.any(|filter| label.contains(&filter)) {
        return;
    }
    run();
    let mut seconds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let (best, median) = (weights / seconds[0] / 1e9, weights / seconds[ROUNDS / 2] / 1e9);
    println!("{label:<34}{best:>12.2}{median:>12.2}{:>12.2}", 2.0 * best);
}

/// Values spread like weights: a sum of uniform ones around 0, about 0.02 wide.
fn write_file(path: &std::path::Path) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..TENSORS * OUT * INPUT {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let sum: i64 = (0..4).map(|part| (state >> (16 * part) & 0xffff) as i64 - 0x8000).sum();
        file.write_all(&f16::from_f32(sum as f32 * 6e-7).to_le_bytes())?;
    }
    file.flush()
}

/// What the definition says, weight by weight.
fn naive(bytes: &[u8]) -> (Vec<i8>, Vec<f16>) {
    let value = |at: usize| f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32();
    let (mut quantized, mut scales) = (vec![0; OUT * INPUT], Vec::new());
    for row in 0..OUT {
        let most = (0..INPUT).fold(0.0f32, |most, at| most.max(value(row * INPUT + at).abs()));
        let scale = f16::from_f32(most / 127.0);
        for at in 0..INPUT {
            let quotient = (value(row * INPUT + at) / scale.to_f32()).round_ties_even();
            quantized[at * OUT + row] = quotient.clamp(-128.0, 127.0) as i8;
        }
        scales.push(scale);
    }
    (quantized, scales)
}
