//! Labelled images, ready for a model.

use std::path::PathBuf;

use lowrank_kernels::random::{generator, key_of, sample};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::error::ImageError;
use super::picture::Picture;
use super::settings::ImageSettings;
use super::source::{ImageItem, items};
use crate::data::DataError;

/// Images with their classes, each decoded once to be checked.
#[derive(Clone, Debug)]
pub struct ImageSet {
    images: Vec<LabelledImage>,
    settings: ImageSettings,
    /// Names of the classes, by number.
    pub labels: Vec<String>,
    /// Number of images that were left out because they are broken.
    pub skipped: usize,
}

/// One image of a set.
#[derive(Clone, Debug)]
pub struct LabelledImage {
    item: ImageItem,
    /// The picture in its final size, if all of them fit into memory.
    kept: Option<Picture>,
    digest: [u8; 32],
    /// Number of its class; none without a label.
    pub label: Option<usize>,
}

/// Bytes of pictures that are kept in memory.
const MOST_KEPT: u64 = 1 << 30;
/// Separates the draw of held-out images from others of the same seed.
const STREAM: &str = "held-out images";

impl ImageSet {
    /// Reads files and folders. The classes are those given, or else the labels of the images in their order; an image with another label is
    /// rejected. Images that cannot be decoded are rejected by name, or left out with `skip_broken`.
    pub fn read(
        paths: &[PathBuf],
        settings: &ImageSettings,
        labels: Option<&[String]>,
        skip_broken: bool,
    ) -> Result<Self, DataError> {
        let items = items(paths)?;
        let side = settings.side().unwrap_or(0) as u64;
        let keep = items.len() as u64 * 3 * side * side <= MOST_KEPT;
        let decoded: Vec<Result<(Picture, [u8; 32]), DataError>> = items
            .par_iter()
            .map(|item| {
                let picture = settings.sized(&item.picture()?);
                let digest = Sha256::digest(&picture.pixels).into();
                Ok((if keep { picture } else { Picture::grey(0, 0, &[]) }, digest))
            })
            .collect();
        let labels = match labels {
            Some(labels) => labels.to_vec(),
            None => ordered(&items),
        };
        let mut set = Self { images: Vec::new(), settings: settings.clone(), labels, skipped: 0 };
        for (item, decoded) in items.into_iter().zip(decoded) {
            let (picture, digest) = match decoded {
                Ok(decoded) => decoded,
                Err(DataError::Image(ImageError::Broken { .. })) if skip_broken => {
                    set.skipped += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let label = item.label.as_ref().map(|name| set.number_of(name, &item)).transpose()?;
            set.images.push(LabelledImage { item, kept: keep.then_some(picture), digest, label });
        }
        match set.images.is_empty() {
            false => Ok(set),
            true => Err(ImageError::Empty {
                paths: paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", "),
            }
            .into()),
        }
    }

    fn number_of(&self, name: &str, item: &ImageItem) -> Result<usize, DataError> {
        self.labels.iter().position(|known| known == name).ok_or_else(|| {
            let known: Vec<&str> = self.labels.iter().take(8).map(String::as_str).collect();
            let more = if self.labels.len() > known.len() { ", .." } else { "" };
            let problem = format!(
                "its class \"{name}\" is none of the model's {}: {}{more}",
                self.labels.len(),
                known.join(", ")
            );
            ImageError::Set { path: item.name().into(), problem }.into()
        })
    }

    /// The same images with the numbers that their classes have among these, which contain all of them.
    pub fn with_labels(mut self, labels: &[String]) -> Self {
        let place = |name: &String| labels.iter().position(|known| known == name);
        let places: Vec<Option<usize>> = self.labels.iter().map(place).collect();
        self.images.iter_mut().for_each(|image| image.label = image.label.and_then(|label| places[label]));
        self.labels = labels.to_vec();
        self
    }

    /// Rejects images without a class.
    pub fn labelled(self) -> Result<Self, DataError> {
        match self.images.iter().find(|image| image.label.is_none()) {
            None => Ok(self),
            Some(image) => {
                let problem = "has no class; put it into a folder named after its class, or give its \"label\"".into();
                Err(ImageError::Set { path: image.item.name().into(), problem }.into())
            }
        }
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// Returns true if there are no images.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// Steps from pictures to pixels.
    pub fn settings(&self) -> &ImageSettings {
        &self.settings
    }

    /// The class of an image.
    pub fn label(&self, number: usize) -> Option<usize> {
        self.images[number].label
    }

    /// The domain of an image.
    pub fn domain(&self, number: usize) -> Option<&str> {
        self.images[number].item.domain.as_deref()
    }

    /// File of an image, with a number where the file holds several.
    pub fn name(&self, number: usize) -> String {
        self.images[number].item.name()
    }

    /// An image in the size that the model sees.
    pub fn picture(&self, number: usize) -> Result<Picture, DataError> {
        let image = &self.images[number];
        match &image.kept {
            Some(picture) => Ok(picture.clone()),
            None => Ok(self.settings.sized(&image.item.picture()?)),
        }
    }

    /// Hash of classes, domains and pixels.
    pub fn fingerprint(&self) -> String {
        let mut hash = Sha256::new();
        self.labels.iter().for_each(|label| hash.update(format!("{label}\n")));
        for image in &self.images {
            hash.update(image.digest);
            hash.update(format!("{:?} {:?}\n", image.label, image.item.domain));
        }
        hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The domains, in the order of their names; none if an image has none.
    pub fn domains(&self) -> Option<Vec<&str>> {
        let mut domains = (0..self.len()).map(|number| self.domain(number)).collect::<Option<Vec<&str>>>()?;
        domains.sort_unstable();
        domains.dedup();
        Some(domains)
    }

    /// The images of other domains than this one.
    pub fn without_domain(self, domain: &str) -> Result<Self, String> {
        let others = |image: &&LabelledImage| image.item.domain.as_deref() != Some(domain);
        let images: Vec<LabelledImage> = self.images.iter().filter(others).cloned().collect();
        let problem = match (images.len(), self.domains()) {
            (0, _) => "all images are of this domain; name data with others too".to_string(),
            (left, Some(known)) if left == self.len() => format!("the domains are {}", known.join(", ")),
            (left, None) if left == self.len() => {
                "no image is of this domain; give it as \"domain\" in JSON lines".to_string()
            }
            _ => return Ok(Self { images, ..self.emptied() }),
        };
        Err(format!("data.images.leave_out = {domain}: {problem}"))
    }

    /// Sets a fraction of the images aside, drawn by the seed: the others, and those.
    pub fn held_out(self, fraction: f64, seed: u64) -> Result<(Self, Self), DataError> {
        let count = (self.len() as f64 * fraction).round() as usize;
        if count == 0 || count >= self.len() {
            let problem = format!(
                "data.validation_fraction = {fraction} sets {count} of {} images aside; it must leave some on both sides, or name others with data.validation",
                self.len()
            );
            return Err(DataError::Split { problem });
        }
        Ok(self.drawn(count, seed))
    }

    /// All but `count` images drawn by the seed, and those.
    pub fn drawn(&self, count: usize, seed: u64) -> (Self, Self) {
        let mut random = generator(seed, key_of(STREAM), 0);
        let mut chosen = vec![false; self.len()];
        sample(&mut random, self.len(), count).into_iter().for_each(|number| chosen[number as usize] = true);
        let part = |aside: bool| {
            let images = self.images.iter().zip(&chosen).filter(|(_, chosen)| **chosen == aside);
            Self { images: images.map(|(image, _)| image.clone()).collect(), ..self.emptied() }
        };
        (part(false), part(true))
    }

    fn emptied(&self) -> Self {
        Self { images: Vec::new(), settings: self.settings.clone(), labels: self.labels.clone(), skipped: 0 }
    }
}

/// The labels of images in their order: as numbers if all of them are, else as texts.
fn ordered(items: &[ImageItem]) -> Vec<String> {
    let mut labels: Vec<String> = items.iter().filter_map(|item| item.label.clone()).collect();
    labels.sort();
    labels.dedup();
    let numbers: Option<Vec<u64>> = labels.iter().map(|label| label.parse().ok()).collect();
    if let Some(numbers) = numbers {
        let mut pairs: Vec<(u64, String)> = numbers.into_iter().zip(labels).collect();
        pairs.sort();
        return pairs.into_iter().map(|(_, label)| label).collect();
    }
    labels
}
