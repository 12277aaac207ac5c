//! Streams of images, and the classes that a model gives them.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::sync::Arc;

use burn::tensor::{Device, Tensor, TensorData};
use lowrank_models::{ImageBatch, ImageClassifier};
use rayon::prelude::*;

use super::{Stream, StreamBatch};
use crate::data::images::{Augment, ImageSet, Picture};
use crate::data::{DataError, Fields, Order, Tag};

/// Images with classes as batches of a vision transformer.
#[derive(Clone, Debug)]
pub struct ImageStream {
    set: Arc<ImageSet>,
    batch: usize,
    order: Option<Order>,
    /// Images of each domain in an order of their own, where every batch has as many of each.
    domains: Vec<(Vec<usize>, Order)>,
    augment: Augment,
    seed: u64,
}

impl ImageStream {
    /// Creates a stream of all images in their order; every one has a class, and a batch at least one row.
    pub fn new(set: Arc<ImageSet>, batch: usize) -> Self {
        Self { set, batch: batch.max(1), order: None, domains: Vec::new(), augment: Augment::default(), seed: 0 }
    }

    /// Repeats endlessly, in a different order in each epoch and with random changes.
    pub fn shuffled(self, augment: Augment, seed: u64) -> Self {
        let order = NonZeroU64::new(self.set.len() as u64).map(|count| Order::new(count, seed));
        Self { order, augment, seed, ..self }
    }

    /// Takes the rows of a shuffled stream from all domains in turn, so that a batch has as many images of each. Rejects images without a domain, and
    /// batches that the number of domains does not divide.
    pub fn balanced(self) -> Result<Self, String> {
        let refused = |problem: String| Err(format!("data.images.balance_domains = true: {problem}"));
        let Some(names) = self.set.domains() else {
            return refused("an image has no domain; give all of them in JSON lines".into());
        };
        if !self.batch.is_multiple_of(names.len()) {
            return refused(format!(
                "train.batch = {} is no multiple of the {} domains {}",
                self.batch,
                names.len(),
                names.join(", ")
            ));
        }
        let images = |name: &str| -> Vec<usize> {
            (0..self.set.len()).filter(|number| self.set.domain(*number) == Some(name)).collect()
        };
        let mut domains = Vec::new();
        for (place, name) in names.into_iter().enumerate() {
            let images = images(name);
            let Some(count) = NonZeroU64::new(images.len() as u64) else { continue };
            domains.push((images, Order::new(count, self.seed.wrapping_add(place as u64))));
        }
        Ok(Self { domains, ..self })
    }

    /// The images.
    pub fn set(&self) -> &ImageSet {
        &self.set
    }

    /// Numbers of the images of a batch, each with its position in the run.
    fn numbers(&self, position: u64) -> Vec<(u64, usize)> {
        let positions = position..position + self.batch as u64;
        if !self.domains.is_empty() {
            let count = self.domains.len() as u64;
            let number = |position: u64| {
                let (images, order) = &self.domains[(position % count) as usize];
                images[order.window(position / count).1 as usize]
            };
            return positions.map(|position| (position, number(position))).collect();
        }
        match &self.order {
            Some(order) => positions.map(|position| (position, order.window(position).1 as usize)).collect(),
            None => positions.take_while(|row| *row < self.rows()).map(|row| (row, row as usize)).collect(),
        }
    }
}

impl Stream<ImageBatch> for ImageStream {
    fn batch(&self) -> usize {
        self.batch
    }

    fn rows(&self) -> u64 {
        self.set.len() as u64
    }

    fn at(&self, position: u64, device: &Device) -> Result<StreamBatch<ImageBatch>, DataError> {
        let numbers = self.numbers(position);
        let picture = |(position, number): &(u64, usize)| {
            Ok(self.augment.apply(self.set.picture(*number)?, self.seed, *position))
        };
        let pictures = numbers.par_iter().map(picture).collect::<Result<Vec<Picture>, DataError>>()?;
        let values: Vec<Vec<f32>> = pictures.par_iter().map(|picture| self.set.settings().values(picture)).collect();
        let (width, height) = pictures.first().map_or((0, 0), |picture| (picture.width, picture.height));
        let labels: Vec<i32> = numbers.iter().map(|(_, number)| self.set.label(*number).unwrap_or(0) as i32).collect();
        let rows = numbers.len();
        let tag = |(row, (_, number)): (usize, &(u64, usize))| {
            let domain = self.set.domain(*number)?;
            let fields = Fields::from_iter([("domain".to_string(), domain.into())]);
            Some(Tag { row, start: 0, len: 1, fields: Arc::new(fields) })
        };
        Ok(StreamBatch {
            counted: rows as u64,
            tags: numbers.iter().enumerate().filter_map(tag).collect(),
            batch: ImageBatch {
                pixels: Tensor::from_data(TensorData::new(values.concat(), [rows, 3, height, width]), device),
                labels: Tensor::from_data(TensorData::new(labels, [rows]), device),
            },
        })
    }
}

/// Classes that a model gives to images, against their own.
#[derive(Clone, Debug)]
pub struct Classified {
    labels: Vec<String>,
    /// Number of images by own and by given class.
    counts: Vec<Vec<u64>>,
    /// Number of correct images and of all images, by domain.
    domains: BTreeMap<String, [u64; 2]>,
    /// Sum of the losses in nats.
    nats: f64,
}

impl Classified {
    /// Runs the model on the batches of a stream that start at these rows, or on all. `each` is called with the number of images so far.
    pub fn of(
        model: &impl ImageClassifier,
        stream: &ImageStream,
        starts: Option<&[u64]>,
        device: &Device,
        mut each: impl FnMut(u64),
    ) -> Result<Self, DataError> {
        let model = model.valid();
        let count = stream.set.labels.len();
        let mut found = Self {
            labels: stream.set.labels.clone(),
            counts: vec![vec![0; count]; count],
            domains: BTreeMap::new(),
            nats: 0.0,
        };
        let all: Vec<u64> = (0..stream.rows()).step_by(stream.batch).collect();
        for start in starts.unwrap_or(&all) {
            let logits = model.logits(stream.at(*start, device)?.batch.pixels);
            let values: Vec<f32> = logits.into_data().try_into_vec().unwrap_or_default();
            for (row, logits) in (*start as usize..).zip(values.chunks(count.max(1))) {
                found.add(stream, row, logits);
            }
            each(found.images());
        }
        Ok(found)
    }

    fn add(&mut self, stream: &ImageStream, row: usize, logits: &[f32]) {
        let label = stream.set.label(row).unwrap_or(0);
        // Of equal ones the first.
        let given = (0..logits.len()).fold(0, |best, class| if logits[class] > logits[best] { class } else { best });
        self.counts[label][given] += 1;
        let most = f64::from(logits[given]);
        let sum: f64 = logits.iter().map(|logit| (f64::from(*logit) - most).exp()).sum();
        self.nats += most + sum.ln() - f64::from(logits[label]);
        if let Some(domain) = stream.set.domain(row) {
            let [correct, all] = self.domains.entry(domain.to_string()).or_default();
            *correct += u64::from(label == given);
            *all += 1;
        }
    }

    /// Number of images.
    pub fn images(&self) -> u64 {
        self.counts.iter().flatten().sum()
    }

    /// Mean loss in nats.
    pub fn loss(&self) -> f64 {
        self.nats / self.images() as f64
    }

    /// Fraction of the images that are given their own class.
    pub fn accuracy(&self) -> f64 {
        let correct: u64 = (0..self.labels.len()).map(|class| self.counts[class][class]).sum();
        correct as f64 / self.images() as f64
    }

    /// Correct images and all images of each class that has any.
    pub fn classes(&self) -> impl Iterator<Item = (&str, [u64; 2])> {
        let named = self.labels.iter().zip(&self.counts).enumerate();
        named
            .map(|(class, (name, counts))| (name.as_str(), [counts[class], counts.iter().sum()]))
            .filter(|(_, [_, all])| *all > 0)
    }

    /// Correct images and all images of each domain.
    pub fn domains(&self) -> &BTreeMap<String, [u64; 2]> {
        &self.domains
    }

    /// The confusion matrix as a picture: a row for each own class, a column for each given one, darker for a larger part of the row.
    pub fn picture(&self) -> Picture {
        let count = self.labels.len();
        let cell = (256 / count.max(1)).clamp(1, 24);
        let side = count * cell;
        let mut pixels = Vec::with_capacity(3 * side * side);
        for y in 0..side {
            let row = &self.counts[y / cell];
            let all = row.iter().sum::<u64>().max(1) as f64;
            for x in 0..side {
                let part = row[x / cell] as f64 / all;
                let shade = |dark: f64| (255.0 - (255.0 - dark) * part).round() as u8;
                pixels.extend([shade(8.0), shade(48.0), shade(107.0)]);
            }
        }
        Picture { width: side, height: side, pixels }
    }
}

/// Several pictures of one size in rows of eight.
pub fn grid(pictures: &[Picture]) -> Option<Picture> {
    const ACROSS: usize = 8;
    let first = pictures.first()?;
    let columns = pictures.len().min(ACROSS);
    let (width, height) = (columns * first.width, pictures.len().div_ceil(ACROSS) * first.height);
    let mut pixels = Vec::with_capacity(3 * width * height);
    for y in 0..height {
        for x in 0..width {
            let number = y / first.height * ACROSS + x / first.width;
            let pixel = pictures.get(number).map(|picture| picture.at(x % first.width, y % first.height));
            pixels.extend(pixel.unwrap_or_default());
        }
    }
    Some(Picture { width, height, pixels })
}
