"""The work folder of a job: what stands in it, under which names, and what is done with a damaged object.

`layout` lists the objects. The other modules own one kind of object each: schema, names, writer, reader.
"""
