"""Items on Pyramid: no view handles the session.

    PYTHONPATH=examples pserve examples/development.ini http_port=8080

`development.ini` names the database, and the session middleware as a filter.  In Python it would
be ``SessionMiddleware(main({}, **settings), Session)``.
Needed, in a clone: ``pip install . pyramid waitress``
"""

from typing import Any

from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPNotFound
from sqlalchemy import String, engine_from_config, orm, select

Session = orm.scoped_session(orm.sessionmaker())


class Base(orm.DeclarativeBase): ...


class Item(Base):
    __tablename__ = "items"
    id: orm.Mapped[int] = orm.mapped_column(primary_key=True)
    name: orm.Mapped[str | None] = orm.mapped_column(String(16))

    def __json__(self, request: Any) -> dict[str, object]:
        return {"id": self.id, "name": self.name}


def create(request: Any) -> Item:
    item = Item()
    request.dbsession.add(item)
    request.dbsession.flush()  # the database assigns the id
    item.name = f"Item #{item.id}"
    return item


def index(request: Any) -> dict[str, object]:
    return {"items": request.dbsession.scalars(select(Item).order_by(Item.id)).all()}


def show(request: Any) -> Any:
    item = request.dbsession.get(Item, int(request.matchdict["id"]))
    return item or HTTPNotFound(json={"error": "not found"})


def main(global_config: object, **settings: str) -> Any:
    engine = engine_from_config(settings)  # "sqlalchemy.url"
    Base.metadata.create_all(engine)
    Session.configure(bind=engine)
    with Configurator(settings=settings) as config:
        config.add_request_method(lambda request: Session(), "dbsession", reify=True)
        config.add_route("items", "/")
        config.add_route("item", r"/{id:\d+}")
        config.add_view(create, route_name="items", request_method="POST", renderer="json")
        config.add_view(index, route_name="items", request_method="GET", renderer="json")
        config.add_view(show, route_name="item", request_method="GET", renderer="json")
        return config.make_wsgi_app()
