//! A node's value for several samples.
use super::machine::{Floats, Machine};
use graphs::interpret::Array;
use std::cell::RefCell;
use std::rc::Rc;

type Result<T> = std::result::Result<T, String>;

/// In the memory of the GPU, of the host, or both.
#[derive(Clone)]
pub(in crate::calibration) struct Value {
    /// Of each sample.
    pub(super) shapes: Vec<Vec<usize>>,
    host: Option<Rc<Vec<Array>>>,
    /// The samples' floats one behind the other.
    gpu: RefCell<Option<Rc<Floats>>>,
}

fn size(shape: &[usize]) -> usize {
    shape.iter().product()
}

impl Value {
    pub(super) fn of_host(arrays: Vec<Array>) -> Value {
        let shapes = arrays.iter().map(|array| array.shape.clone()).collect();
        Value { shapes, host: Some(Rc::new(arrays)), gpu: RefCell::default() }
    }

    pub(super) fn of_gpu(shapes: Vec<Vec<usize>>, floats: Floats) -> Value {
        Value { shapes, host: None, gpu: RefCell::new(Some(Rc::new(floats))) }
    }

    /// The same numbers in other shapes; nothing where only the host has them.
    pub(super) fn reshaped(&self, shapes: Vec<Vec<usize>>) -> Option<Value> {
        self.gpu.borrow().as_ref()?;
        Some(Value { shapes, host: None, gpu: self.gpu.clone() })
    }

    /// Numbers of all samples.
    pub(super) fn count(&self) -> usize {
        self.shapes.iter().map(|shape| size(shape)).sum()
    }

    /// Where each sample begins.
    pub(super) fn places(&self) -> Vec<usize> {
        let begin = |place: &mut usize, shape: &Vec<usize>| Some(std::mem::replace(place, *place + size(shape)));
        self.shapes.iter().scan(0, begin).collect()
    }

    /// The size of the last dimension, the same for all samples; 0 without any.
    pub(in crate::calibration) fn width(&self) -> usize {
        let width = |shape: &Vec<usize>| shape.last().copied().unwrap_or(1);
        let first = self.shapes.first().map_or(0, width);
        if self.shapes.iter().all(|shape| width(shape) == first) { first } else { 0 }
    }

    /// Rows of each sample.
    pub(in crate::calibration) fn rows(&self) -> Vec<usize> {
        let width = self.width().max(1);
        self.shapes.iter().map(|shape| size(shape) / width).collect()
    }

    /// Put there where it is not yet.
    pub(super) fn on_gpu(&self, machine: &Machine) -> Result<Rc<Floats>> {
        if let Some(floats) = &*self.gpu.borrow() {
            return Ok(Rc::clone(floats));
        }
        let arrays = self.host.as_ref().ok_or("its value is nowhere")?;
        let mut floats = machine.fresh(self.count())?;
        for (array, place) in std::iter::zip(&**arrays, self.places()) {
            machine.upload_at(array.floats()?, &mut floats, place)?;
        }
        let floats = Rc::new(floats);
        *self.gpu.borrow_mut() = Some(Rc::clone(&floats));
        Ok(floats)
    }

    pub(super) fn on_host(&self, machine: &Machine) -> Result<Rc<Vec<Array>>> {
        if let Some(arrays) = &self.host {
            return Ok(Rc::clone(arrays));
        }
        let floats = self.on_gpu(machine)?;
        let array = |(shape, place): (&Vec<usize>, usize)| {
            Ok(Array::float(shape.clone(), machine.download(&floats, place..place + size(shape))?))
        };
        Ok(Rc::new(std::iter::zip(&self.shapes, self.places()).map(array).collect::<Result<_>>()?))
    }

    /// Integers of all samples, which the host always has.
    pub(super) fn ints(&self) -> Result<Vec<i32>> {
        let arrays = self.host.as_ref().ok_or("wanted integers, found floats")?;
        Ok(arrays.iter().map(Array::ints).collect::<Result<Vec<_>>>()?.concat())
    }

    /// Largest magnitude and sum of magnitudes by channel.
    pub(in crate::calibration) fn columns(&self, machine: &Machine) -> Result<(Vec<f32>, Vec<f64>)> {
        machine.columns(&*self.on_gpu(machine)?, self.rows().iter().sum(), self.width())
    }

    /// Some rows, by sample and row in it.
    pub(in crate::calibration) fn some(
        &self,
        machine: &Machine,
        wanted: impl Iterator<Item = (usize, usize)>,
    ) -> Result<Vec<Vec<f32>>> {
        let width = self.width().max(1);
        let first: Vec<usize> = self.places().into_iter().map(|place| place / width).collect();
        let index: Vec<i32> = wanted.map(|(sample, row)| (first[sample] + row) as i32).collect();
        if index.is_empty() {
            return Ok(Vec::new());
        }
        let rows = machine.rows(&*self.on_gpu(machine)?, &index, width)?;
        let rows = machine.download(&rows, 0..index.len() * width)?;
        Ok(rows.chunks_exact(width).map(<[f32]>::to_vec).collect())
    }
}
