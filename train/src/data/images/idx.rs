//! IDX files of MNIST: images `[n, rows, columns]` and labels `[n]` of bytes.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;

use super::error::ImageError;
use super::picture::Picture;
use crate::data::DataError;

/// Largest file that is read, unpacked.
const LARGEST: u64 = 1 << 32;

/// Images of one size with their labels.
#[derive(Debug)]
pub struct IdxImages {
    width: usize,
    height: usize,
    values: Vec<u8>,
    /// Labels, one for each image.
    pub labels: Vec<u8>,
}

impl IdxImages {
    /// Reads a file of images, and the file of labels beside it.
    pub fn read(path: &Path) -> Result<Self, DataError> {
        let (dims, values) = read(path, 3)?;
        let beside = labels_of(path);
        if !beside.exists() {
            let problem = format!("there are no labels beside it; the file {} must hold them", beside.display());
            return Err(set(path, problem));
        }
        let (labels_dims, labels) = read(&beside, 1)?;
        if labels_dims[0] != dims[0] {
            return Err(set(&beside, format!("has {} labels for {} images", labels_dims[0], dims[0])));
        }
        if dims[1..].contains(&0) {
            return Err(set(path, format!("has images of {} x {} pixels", dims[1], dims[2])));
        }
        Ok(Self { width: dims[2], height: dims[1], values, labels })
    }

    /// The image with a number below the count of labels.
    pub fn picture(&self, number: usize) -> Picture {
        let size = self.width * self.height;
        Picture::grey(self.width, self.height, &self.values[number * size..(number + 1) * size])
    }
}

/// Returns true if a file has the name of IDX images.
pub fn is_idx(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    name.contains("idx3-ubyte")
}

/// `train-labels-idx1-ubyte` for `train-images-idx3-ubyte`.
fn labels_of(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(name.replace("images", "labels").replace("idx3", "idx1"))
}

/// Sizes and values of a file of bytes with so many dimensions.
fn read(path: &Path, dimensions: usize) -> Result<(Vec<usize>, Vec<u8>), DataError> {
    let file = File::open(path).map_err(DataError::read(path))?;
    let mut reader: Box<dyn Read> = match path.extension().is_some_and(|end| end == "gz") {
        true => Box::new(MultiGzDecoder::new(file)),
        false => Box::new(file),
    };
    let mut header = vec![0; 4 + 4 * dimensions];
    reader.read_exact(&mut header).map_err(|error| set(path, format!("is too short for an IDX file ({error})")))?;
    if header[..4] != [0, 0, 8, dimensions as u8] {
        return Err(set(path, format!("is no IDX file of bytes with {dimensions} dimensions")));
    }
    let sizes: Vec<usize> = header[4..].as_chunks().0.iter().map(|size| u32::from_be_bytes(*size) as usize).collect();
    let count = sizes.iter().map(|size| *size as u128).product::<u128>();
    if count > u128::from(LARGEST) {
        return Err(set(path, format!("says that it holds {count} values, more than {LARGEST}")));
    }
    // Read before it is believed: the header may promise more than there is.
    let mut values = Vec::new();
    let found = reader.by_ref().take(count as u64 + 1).read_to_end(&mut values).map_err(DataError::read(path))?;
    match found as u128 == count {
        true => Ok((sizes, values)),
        false => Err(set(path, format!("has not the {count} values that its header says: truncated or changed"))),
    }
}

fn set(path: &Path, problem: String) -> DataError {
    ImageError::Set { path: path.to_path_buf(), problem }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_and_labels_are_read_and_damaged_files_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("train-images-idx3-ubyte");
        let header = |sizes: &[u32]| {
            let mut bytes = vec![0, 0, 8, sizes.len() as u8];
            sizes.iter().for_each(|size| bytes.extend(size.to_be_bytes()));
            bytes
        };
        let write = |images: Vec<u8>, labels: Option<Vec<u8>>| {
            std::fs::write(&path, images).unwrap();
            let beside = dir.path().join("train-labels-idx1-ubyte");
            let _ = std::fs::remove_file(&beside);
            labels.into_iter().for_each(|labels| std::fs::write(&beside, labels).unwrap());
            IdxImages::read(&path)
        };
        let good = [header(&[2, 1, 3]), vec![1, 2, 3, 4, 5, 6]].concat();
        let labels = [header(&[2]), vec![7, 9]].concat();
        let images = write(good.clone(), Some(labels.clone())).unwrap();
        assert_eq!(images.labels, [7, 9]);
        assert_eq!(images.picture(1), Picture::grey(3, 1, &[4, 5, 6]));
        for (images, labels, problem) in [
            (good.clone(), None, "train-labels-idx1-ubyte"),
            (good.clone(), Some([header(&[3]), vec![1, 2, 3]].concat()), "3 labels for 2 images"),
            (good[..good.len() - 1].to_vec(), Some(labels.clone()), "truncated"),
            ([good.clone(), vec![0]].concat(), Some(labels.clone()), "truncated or changed"),
            (header(&[u32::MAX, u32::MAX, u32::MAX]), Some(labels.clone()), "more than"),
            (vec![0, 0], Some(labels.clone()), "too short"),
            (b"a text that is long enough".to_vec(), Some(labels.clone()), "no IDX file"),
        ] {
            let reason = write(images, labels).unwrap_err().to_string();
            assert!(reason.contains(problem), "{reason}");
        }
    }
}
