"""Tasks on which sleep makes a difference: seeded sequences, held-out contexts, and the accuracy of guessing."""

from zoo.tasks.task import Batch as Batch
from zoo.tasks.task import Split as Split
from zoo.tasks.task import Task as Task
from zoo.tasks.task import new_task as new_task
from zoo.tasks.task import tasks as tasks
