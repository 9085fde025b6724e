"""One process's share of a data set."""

from patchsae.data.images import Images, Item
from patchsae.fast import processes


class Share(Images):
    """This process's part of a data set: whole batches, so that each has the bits it would have in one process."""

    def __init__(self, ds, batch_images: int):
        batches = processes.share(-(-len(ds) // batch_images))
        self.ds, self.rows = ds, range(len(ds))[batches.start * batch_images:batches.stop * batch_images]
        self.from_files = ds.from_files
        super().__init__(ds.labels[self.rows.start:self.rows.stop], ds.class_names)

    def __getitem__(self, i: int) -> Item:
        return self.ds[self.rows[i]]

    def places(self, rows) -> list[int]:
        """Positions in the whole data set of positions in this part."""
        return [self.rows[i] for i in rows]

    def tell_unreadable(self) -> None:
        """Note in the data set what no process could read; each has made sure that its own are few enough."""
        found = dict(zip(self.places(self.unreadable), self.unreadable.values()))
        for part in processes.gathered(found):
            self.ds.unreadable.update(part)
